# SPDX-License-Identifier: Apache-2.0
"""How far a batch is, in a small file that the run replaces; for `rdma-kv status` and `list`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from rdma_kv_cache.config.replace_file import replace_file

if TYPE_CHECKING:
    from pathlib import Path


class BatchState(msgspec.Struct, frozen=True):
    """Counts of prompts. Those that earlier runs finished are among them."""

    total: int
    answered: int
    failed: int
    done_before: int
    """How many had a result when this run began."""
    seconds: float
    """How long this run has been sending requests."""

    @property
    def done(self) -> int:
        """How many have a result, good or bad."""
        return self.answered + self.failed

    @property
    def per_minute(self) -> float | None:
        """Results of this run a minute; None while it has none."""
        new = self.done - self.done_before
        return 60 * new / self.seconds if new > 0 and self.seconds > 0 else None

    @property
    def remaining_s(self) -> float | None:
        """How long the rest takes at this run's rate; None while that is not known."""
        rate = self.per_minute
        return None if rate is None else 60 * (self.total - self.done) / rate


def write_state(path: Path, state: BatchState) -> None:
    """Replace the file. It is a convenience: what cannot be written does not stop a batch."""
    with contextlib.suppress(OSError):
        replace_file(path, msgspec.json.encode(state) + b"\n")


def read_state(path: Path) -> BatchState:
    """Return what the run wrote last. Raises OSError, msgspec.DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=BatchState)
