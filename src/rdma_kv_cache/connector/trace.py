# SPDX-License-Identifier: Apache-2.0
"""A trace of the writes of a prefill worker (`rdma.trace_file`), for measurements."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdma_kv_cache.connector.layout import KVLayout
    from rdma_kv_cache.connector.outgoing import Outgoing, PageWrites


class Trace:
    """Appends one line of JSON for each write that ended; does nothing without a path.

    A line has `transfer`, `prompt_tokens`, `layers` (first and last), `bytes`, `pages`, `ok`, and
    three times, s, of this machine's monotonic clock: `posted` (handed to the engine), `computed`
    (its bytes were seen to be final; on a GPU up to a millisecond late) and `done` (acknowledged).
    """

    def __init__(self, path: str, layout: KVLayout) -> None:
        self._file = Path(path).open("a") if path else None  # noqa: SIM115 - lives with the worker
        self._layout = layout
        self._open: dict[int, dict[str, Any]] = {}

    def posted(self, write_id: int, out: Outgoing, writes: PageWrites) -> None:
        """A write was handed to the engine."""
        if self._file is None:
            return
        now = time.monotonic()
        layers = [self._layer_of(int(writes.source[index])) for index in (0, -1)]
        self._open[write_id] = {
            "transfer": out.transfer_id, "prompt_tokens": out.prompt_tokens, "layers": layers,
            "bytes": writes.total_bytes, "pages": len(writes.nbytes), "pid": os.getpid(),
            "posted": now, "computed": None if writes.after else now,
        }  # fmt: skip

    def computed(self, write_id: int, now: float) -> None:
        """What a write waited for is computed."""
        if (line := self._open.get(write_id)) is not None:
            line["computed"] = now

    def ended(self, write_id: int, ok: bool) -> None:
        """A write was acknowledged or failed."""
        if self._file is None or (line := self._open.pop(write_id, None)) is None:
            return
        print(json.dumps({**line, "done": time.monotonic(), "ok": ok}), file=self._file)
        if not self._open:
            self._file.flush()

    def _layer_of(self, address: int) -> int:
        """The layer that a page at `address` belongs to; layers may lie in one block's bytes."""
        for index, layer in enumerate(self._layout.layers):
            block, rest = divmod(address - layer.base, layer.block_stride)
            if rest == 0 and 0 <= block < self._layout.num_blocks:
                return index
        return -1
