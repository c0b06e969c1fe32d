# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.guest import why_not


@pytest.fixture(scope="session", autouse=True)
def guests_can_start() -> None:
    """Skips where they cannot, with the reason."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
