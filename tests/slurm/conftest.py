# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.slurm import Lab, why_not

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def shared_lab() -> Iterator[Lab]:
    """One lab for all tests; tests take `lab`."""
    if reason := why_not():
        pytest.skip(reason)
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """A lab with all nodes idle: p0 and p1 (prefill), d0 and d1 (decode)."""
    yield shared_lab
    shared_lab.restore()


@pytest.fixture(scope="session")
def accounting_lab() -> Iterator[Lab]:
    """A lab with accounting, for sacct; its jobs are not ended between tests."""
    if reason := why_not(accounting=True):
        pytest.skip(reason)
    with Lab(accounting=True) as lab:
        yield lab
