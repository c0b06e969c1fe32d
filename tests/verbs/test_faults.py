# SPDX-License-Identifier: Apache-2.0
"""What the user sees of each fault, how soon, and that nothing lands after the fence."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.verbs.fault_list import FAULTS, POWER_CUT, Fault
from tests.verbs.lab import Lab
from tests.verbs.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.verbs, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Lab(nodes=3, timeout_s=600) as lab:
        yield Stage(lab)


@pytest.mark.parametrize("name", [*FAULTS, "node power cut"])
def test_fault(stage: Stage, name: str) -> None:
    check(FAULTS.get(name, POWER_CUT), stage)


def check(fault: Fault, stage: Stage) -> None:
    outcome = fault.run(stage)
    print(outcome)
    assert re.search(fault.says, outcome.saw, re.DOTALL), outcome.saw
    assert outcome.seconds <= fault.within_s
    assert outcome.landed == 0
    assert outcome.problems == ()
