# SPDX-License-Identifier: Apache-2.0
"""One prefill's KV on its way: what is computed, what decode asked for, what is sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from rdma_kv_cache.connector.layout import KVLayout
    from rdma_kv_cache.connector.metadata import PrefillChunk, PrefillEnd
    from rdma_kv_cache.connector.peers import Peer

    Int64s = npt.NDArray[np.int64]

NULL_BLOCK = 0
"""vLLM's block 0 stands for 'no block' (out of the attention window)."""


@dataclass(frozen=True)
class Target:
    """Where decode wants the pages: per group, blocks for the last pages of the prompt."""

    peer: Peer
    epoch: int
    first_page: tuple[int, ...]
    blocks: tuple[Int64s, ...]


@dataclass(frozen=True)
class PageWrites:
    """Page copies: local address, remote address and size in bytes, int64 arrays of one length."""

    source: Int64s
    destination: Int64s
    nbytes: Int64s


@dataclass
class Outgoing:
    """State of one transfer on the prefill side.

    `ready[l]`: tokens whose KV of layer l is final; `sent[l]`: pages of layer l already written
    or not wanted. `closed` means that no write will be posted any more.
    """

    req_id: str
    transfer_id: str
    prompt_tokens: int
    layout: KVLayout
    blocks: list[Int64s] = field(default_factory=list)
    target: Target | None = None
    in_flight: set[int] = field(default_factory=set)
    end: PrefillEnd | None = None
    signalled: bool = False
    closed: bool = False
    refusal: str | None = None
    cancelled_epoch: int | None = None
    lease_until: float = 0.0
    pages_posted: int = 0
    computed_at: float | None = None
    target_at: float = 0.0
    flight_began: float = 0.0
    busy_s: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.layout.layers)
        self.ready: Int64s = np.zeros(count, dtype=np.int64)
        self.sent: Int64s = np.zeros(count, dtype=np.int64)

    def add_chunk(self, chunk: PrefillChunk) -> None:
        """Take in a step's blocks, which are appended unless the request (re)started."""
        if chunk.restart:
            self.blocks = [np.array(ids, dtype=np.int64) for ids in chunk.block_ids]
            return
        # Converted once a chunk: every layer reads them, and 4,096 ids take 150 us from a list.
        for group, new in enumerate(chunk.block_ids):
            self.blocks[group] = np.append(self.blocks[group], np.array(new, dtype=np.int64))

    def restart(self) -> None:
        """The request was preempted: its blocks go back and its tokens are computed anew.

        Pages that were sent stay sent: they hold the same tokens' KV.
        """
        self.blocks = []
        self.ready[:] = 0
        self.computed_at = None

    def set_target(self, peer: Peer, epoch: int, block_ids: list[list[int]], now: float) -> None:
        """Decode asks for its last pages. Raises ValueError if the page counts cannot match."""
        totals = [self.layout.pages(g, self.prompt_tokens) for g in range(len(block_ids))]
        if len(block_ids) != len(self.layout.block_tokens) or any(
            len(ids) > total for ids, total in zip(block_ids, totals, strict=True)
        ):
            raise ValueError(
                f"REGISTER names {[len(ids) for ids in block_ids]} blocks, the prompt of "
                f"{self.prompt_tokens} tokens has {totals} pages here: another prompt or tokenizer"
            )
        first = tuple(t - len(ids) for t, ids in zip(totals, block_ids, strict=True))
        blocks = tuple(np.array(ids, dtype=np.int64) for ids in block_ids)
        self.target, self.target_at = Target(peer, epoch, first, blocks), now
        for index, layer in enumerate(self.layout.layers):
            self.sent[index] = first[layer.group]

    def take_writes(self, layers: Iterable[int]) -> PageWrites | None:
        """Page copies of these layers that have become possible; they then count as sent."""
        if self.target is None or self.closed:
            return None
        parts = [p for index in layers if (p := self._layer_writes(self.target, index))]
        if not parts:
            return None
        source, destination, nbytes = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        self.pages_posted += len(nbytes)
        return PageWrites(source, destination, nbytes)

    def all_sent(self) -> bool:
        """True if every page of every layer was posted."""
        return self.target is not None and all(
            self.sent[index] >= self.layout.pages(layer.group, self.prompt_tokens)
            for index, layer in enumerate(self.layout.layers)
        )

    def _layer_writes(self, target: Target, index: int) -> tuple[Int64s, Int64s, Int64s] | None:
        layer = self.layout.layers[index]
        begin = int(self.sent[index])
        end = self.layout.final_pages(layer.group, int(self.ready[index]), self.prompt_tokens)
        if end <= begin:
            return None
        self.sent[index] = end
        first = target.first_page[layer.group]
        here = self.blocks[layer.group][begin:end]
        there = target.blocks[layer.group][begin - first : end - first]
        real = (here != NULL_BLOCK) & (there != NULL_BLOCK)
        here, there = here[real], there[real]
        assert target.peer.remote is not None
        remote = target.peer.remote.layers[index]
        return (
            layer.base + here * layer.block_stride,
            remote.base + there * remote.block_stride,
            np.full(len(here), layer.page_bytes, dtype=np.int64),
        )
