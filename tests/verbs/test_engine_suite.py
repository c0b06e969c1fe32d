# SPDX-License-Identifier: Apache-2.0
"""The engine's own tests over verbs, on one rail and on two, in a guest."""

from __future__ import annotations

import sys

import pytest

from tests.guest import run_guests
from tests.verbs.lab import GUEST_ENVIRONMENT

pytestmark = [pytest.mark.verbs, pytest.mark.timeout(700)]

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "120"]


def test_all_on_one_rail() -> None:
    tests = ["tests/engine", "--ignore", "tests/engine/test_stub.py"]
    run_guests([*PYTEST, *tests], env=GUEST_ENVIRONMENT, timeout_s=600).check()


def test_transfers_on_two_rails() -> None:
    env = {**GUEST_ENVIRONMENT, "RKV_TEST_DEVICES": "rxe0,rxe1"}
    run = run_guests([*PYTEST, "tests/engine/test_transfer.py"], rails=2, env=env, timeout_s=400)
    run.check()
