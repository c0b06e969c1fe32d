# SPDX-License-Identifier: Apache-2.0
"""The batch that each test runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from batch_case import Batch

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """A batch with no prompts yet, and no key from the environment."""
    monkeypatch.delenv("RDMA_KV_API_KEY", raising=False)
    return Batch(tmp_path)
