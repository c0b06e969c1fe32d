# SPDX-License-Identifier: Apache-2.0
"""One prefill's KV on its way: what is computed, what decode asked for, what is sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


@dataclass(frozen=True, eq=False)
class PageWrites:
    """Page copies: local address, remote address and size in bytes, int64 arrays of one length.

    The source bytes are final once the engine has reached the mark `after` (0: they are).
    """

    source: Int64s
    destination: Int64s
    nbytes: Int64s
    after: int
    total_bytes: int


@dataclass(frozen=True)
class _Pages:
    """A run of pages of one group, for every layer of it alike: offsets from the layers' bases."""

    key: tuple[int, ...]
    source: Int64s
    destination: Int64s
    nbytes: Int64s
    total_bytes: int


@dataclass
class Outgoing:
    """State of one transfer on the prefill side.

    `ready[l]`: tokens whose KV of layer l is final once the engine has reached `marks[l]`;
    `sent[l]`: pages of layer l already written or not wanted. `closed` means that no write will be
    posted any more. Times are `time.monotonic()` seconds.
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
    launched_at: float = 0.0
    computed_at: float | None = None
    target_at: float = 0.0
    busy_s: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.layout.layers)
        groups = range(len(self.layout.block_tokens))
        self.ready, self.sent, self.marks = [0] * count, [0] * count, [0] * count
        self._totals = [self.layout.pages(g, self.prompt_tokens) for g in groups]
        self._layers_computed = 0
        self._layers_sent = 0
        # The same pages are asked for of one layer after the other, on vLLM's forward thread.
        self._pages: dict[int, _Pages] = {}
        self._moving: set[int] = set()
        self._moving_since = 0.0

    def add_chunk(self, chunk: PrefillChunk) -> None:
        """Take in a step's blocks, which are appended unless the request (re)started."""
        self._pages.clear()
        if chunk.restart:
            self.blocks = [np.array(ids, dtype=np.int64) for ids in chunk.block_ids]
            return
        # Converted once a chunk: every layer reads them, and 4,096 ids take 150 us from a list.
        for group, new in enumerate(chunk.block_ids):
            self.blocks[group] = np.append(self.blocks[group], np.array(new, dtype=np.int64))

    def layer_done(self, index: int, computed: int, mark: int) -> None:
        """The layer's KV of `computed` tokens is final once `mark` is reached (0: it is)."""
        if self.ready[index] < self.prompt_tokens <= computed:
            self._layers_computed += 1
        self.ready[index], self.marks[index] = computed, mark

    def layers_behind(self, computed: int) -> list[int]:
        """Layers that have less than `computed` tokens."""
        return [index for index, ready in enumerate(self.ready) if ready < computed]

    def is_computed(self) -> bool:
        """Whether every layer has the whole prompt."""
        return self._layers_computed == len(self.ready)

    def restart(self) -> None:
        """The request was preempted: its blocks go back and its tokens are computed anew.

        Pages that were sent stay sent: they hold the same tokens' KV.
        """
        self.blocks = []
        self._pages.clear()
        self.ready = [0] * len(self.ready)
        self._layers_computed = 0
        self.computed_at = None

    def set_target(self, peer: Peer, epoch: int, block_ids: list[list[int]], now: float) -> None:
        """Decode asks for its last pages. Raises ValueError if the page counts cannot match."""
        totals = self._totals
        if len(block_ids) != len(totals) or any(
            len(ids) > total for ids, total in zip(block_ids, totals, strict=True)
        ):
            raise ValueError(
                f"REGISTER names {[len(ids) for ids in block_ids]} blocks, the prompt of "
                f"{self.prompt_tokens} tokens has {totals} pages here: another prompt or tokenizer"
            )
        first = tuple(t - len(ids) for t, ids in zip(totals, block_ids, strict=True))
        blocks = tuple(np.array(ids, dtype=np.int64) for ids in block_ids)
        self.target, self.target_at = Target(peer, epoch, first, blocks), now
        self._pages.clear()
        self._layers_sent = 0
        for index, layer in enumerate(self.layout.layers):
            self.sent[index] = first[layer.group]
            self._layers_sent += first[layer.group] >= totals[layer.group]

    def take_writes(
        self, layers: Iterable[int], reached: Callable[[int], bool]
    ) -> list[PageWrites]:
        """Page copies of these layers that have become possible; they then count as sent.

        One item for all layers whose marks are reached, then one for each other layer: marks of
        different streams cannot be compared. Raises ValueError if decode wants a page that is not
        held here any more.
        """
        if self.target is None or self.closed:
            return []
        parts = [p for index in layers if (p := self._layer_writes(self.target, index))]
        self.pages_posted += sum(len(part.nbytes) for part in parts)
        if len(parts) < 2:
            return parts
        final = [part for part in parts if part.after == 0 or reached(part.after)]
        gated = [part for part in parts if part not in final] if len(final) < len(parts) else []
        return [_join(final), *gated] if final else gated

    def all_sent(self) -> bool:
        """True if every page of every layer was posted."""
        return self.target is not None and self._layers_sent == len(self.sent)

    def write_began(self, write_id: int, now: float) -> None:
        """The bytes of a posted write can flow: what they wait for is computed."""
        if not self._moving:
            self._moving_since = now
        self._moving.add(write_id)

    def write_ended(self, write_id: int, now: float) -> None:
        """A write was acknowledged or failed.

        One that was never seen to begin took less than the time between two looks at the GPU, and
        adds nothing to `busy_s`.
        """
        self.in_flight.discard(write_id)
        if write_id in self._moving:
            self._moving.discard(write_id)
            if not self._moving:
                self.busy_s += now - self._moving_since

    def _layer_writes(self, target: Target, index: int) -> PageWrites | None:
        layer = self.layout.layers[index]
        group = layer.group
        begin = self.sent[index]
        end = self.layout.final_pages(group, self.ready[index], self.prompt_tokens)
        if end <= begin:
            return None
        self.sent[index] = end
        self._layers_sent += end >= self._totals[group]
        assert target.peer.remote is not None
        remote = target.peer.remote.layers[index]
        key = (begin, end, layer.block_stride, remote.block_stride, layer.page_bytes)
        pages = self._pages.get(group)
        if pages is None or pages.key != key:
            pages = self._pages[group] = self._find_pages(target, group, key)
        return PageWrites(
            layer.base + pages.source,
            remote.base + pages.destination,
            pages.nbytes,
            self.marks[index],
            pages.total_bytes,
        )

    def _find_pages(self, target: Target, group: int, key: tuple[int, ...]) -> _Pages:
        begin, end, stride_here, stride_there, page_bytes = key
        first = target.first_page[group]
        here = self.blocks[group][begin:end]
        there = target.blocks[group][begin - first : end - first]
        wanted = there != NULL_BLOCK
        if (here[wanted] == NULL_BLOCK).any():
            raise ValueError("decode asks for pages that have left the attention window here")
        here, there = here[wanted], there[wanted]
        nbytes = np.full(len(here), page_bytes, dtype=np.int64)
        return _Pages(key, here * stride_here, there * stride_there, nbytes, page_bytes * len(here))


def _join(parts: list[PageWrites]) -> PageWrites:
    return PageWrites(
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.destination for part in parts]),
        np.concatenate([part.nbytes for part in parts]),
        0,
        sum(part.total_bytes for part in parts),
    )
