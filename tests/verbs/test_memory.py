# SPDX-License-Identifier: Apache-2.0
"""Nothing grows while peers and registrations come and go."""

from __future__ import annotations

import pytest

from tests.verbs.cycles import run_cycles

pytestmark = [pytest.mark.verbs, pytest.mark.timeout(400)]


def test_cycles_leave_nothing_behind() -> None:
    flatness = run_cycles(200, samples=20)
    assert flatness.grown == []
    assert flatness.last["pinned_bytes"] == 0
    assert flatness.last["verbs_qps"] == 0
