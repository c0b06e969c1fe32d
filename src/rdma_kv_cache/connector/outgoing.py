# SPDX-License-Identifier: Apache-2.0
"""One prefill's KV on its way: what is computed, what decode asked for, what is sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

    from rdma_kv_cache.connector.heads import Slice
    from rdma_kv_cache.connector.layout import KVLayout
    from rdma_kv_cache.connector.metadata import PrefillChunk, PrefillEnd
    from rdma_kv_cache.connector.peers import Peer

    Int64s = npt.NDArray[np.int64]

NULL_BLOCK = 0
"""vLLM's block 0 stands for 'no block' (out of the attention window)."""


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

    key: tuple[int, int, int, int, Slice]
    source: Int64s
    destination: Int64s
    nbytes: Int64s
    total_bytes: int


@dataclass(eq=False)
class Outgoing:
    """State of one request on the prefill side.

    `ready[l]`: tokens whose KV of layer l is final once the engine has reached `marks[l]`.
    `deliveries`, one for each decode rank that registered, are by the native number of the peer.
    `closed` means that no write will be posted any more. Times are `time.monotonic()` seconds.
    """

    req_id: str
    transfer_id: str
    prompt_tokens: int
    layout: KVLayout
    blocks: list[Int64s] = field(default_factory=list)
    deliveries: dict[int, Delivery] = field(default_factory=dict)
    end: PrefillEnd | None = None
    closed: bool = False
    lease_until: float = 0.0
    launched_at: float = 0.0
    computed_at: float | None = None
    busy_s: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.layout.layers)
        groups = range(len(self.layout.block_tokens))
        self.ready, self.marks = [0] * count, [0] * count
        self.totals = [self.layout.pages(g, self.prompt_tokens) for g in groups]
        self._layers_computed = 0
        self._moving: set[int] = set()
        self._moving_since = 0.0

    def add_chunk(self, chunk: PrefillChunk) -> None:
        """Take in a step's blocks, which are appended unless the request (re)started."""
        for delivery in self.deliveries.values():
            delivery.forget_pages()
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
        self.ready = [0] * len(self.ready)
        self._layers_computed = 0
        self.computed_at = None

    def add_target(
        self, peer: Peer, epoch: int, block_ids: list[list[int]], now: float
    ) -> Delivery:
        """A decode rank asks for its last pages. Raises ValueError if the counts cannot match."""
        if len(block_ids) != len(self.totals) or any(
            len(ids) > total for ids, total in zip(block_ids, self.totals, strict=True)
        ):
            raise ValueError(
                f"REGISTER names {[len(ids) for ids in block_ids]} blocks, the prompt of "
                f"{self.prompt_tokens} tokens has {self.totals} pages here: another prompt or "
                "tokenizer"
            )
        delivery = Delivery(self, peer, epoch, block_ids, now)
        self.deliveries[peer.native] = delivery
        return delivery

    def all_registered(self) -> bool:
        """Whether every decode rank that this rank has something for has registered."""
        return any(len(self.deliveries) >= d.peer.fan_out for d in self.deliveries.values())

    def is_in_flight(self) -> bool:
        """Whether a posted write is not acknowledged: it reads our blocks."""
        return any(delivery.in_flight for delivery in self.deliveries.values())

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
        if write_id in self._moving:
            self._moving.discard(write_id)
            if not self._moving:
                self.busy_s += now - self._moving_since


class Delivery:
    """What one decode rank gets of an Outgoing.

    `epoch` names its REGISTER; `sent[l]`: pages of layer l already written or not wanted. `refusal`
    and `cancelled` are what is to be answered once nothing is in flight.
    """

    def __init__(
        self, out: Outgoing, peer: Peer, epoch: int, block_ids: list[list[int]], now: float
    ) -> None:
        self.out = out
        self.peer = peer
        self.epoch = epoch
        self.registered_at = now
        self.in_flight: set[int] = set()
        self.signalled = False
        self.delivered = False
        self.refusal: str | None = None
        self.cancelled = False
        self.pages_posted = 0
        layers = out.layout.layers
        self._first_page = [t - len(ids) for t, ids in zip(out.totals, block_ids, strict=True)]
        self._blocks = [np.array(ids, dtype=np.int64) for ids in block_ids]
        self._totals = [
            0 if cut is None else out.totals[layer.group]
            for layer, cut in zip(layers, peer.slices, strict=True)
        ]
        self.sent = [self._first_page[layer.group] for layer in layers]
        self._layers_left = sum(s < t for s, t in zip(self.sent, self._totals, strict=True))
        # The same pages are asked for of one layer after the other, on vLLM's forward thread.
        self._pages: dict[int, _Pages] = {}

    def forget_pages(self) -> None:
        """The request's blocks have changed."""
        self._pages.clear()

    def all_sent(self) -> bool:
        """True if every page of every layer was posted."""
        return self._layers_left == 0

    def take_writes(
        self, layers: Iterable[int], reached: Callable[[int], bool]
    ) -> list[PageWrites]:
        """Page copies of these layers that have become possible; they then count as sent.

        One item for all layers whose marks are reached, then one for each other layer: marks of
        different streams cannot be compared. Raises ValueError if decode wants a page that is not
        held here any more.
        """
        if self.out.closed or self.signalled:
            return []
        parts = [part for index in layers if (part := self._layer_writes(index))]
        self.pages_posted += sum(len(part.nbytes) for part in parts)
        if len(parts) < 2:
            return parts
        final = [part for part in parts if part.after == 0 or reached(part.after)]
        gated = [part for part in parts if part not in final] if len(final) < len(parts) else []
        return [_join(final), *gated] if final else gated

    def _layer_writes(self, index: int) -> PageWrites | None:
        layer, cut = self.out.layout.layers[index], self.peer.slices[index]
        group, begin = layer.group, self.sent[index]
        end = self.out.layout.final_pages(group, self.out.ready[index], self.out.prompt_tokens)
        if cut is None or end <= begin:
            return None
        self.sent[index] = end
        self._layers_left -= end >= self._totals[index]
        assert self.peer.remote is not None
        remote = self.peer.remote.layers[index]
        key = (begin, end, layer.block_stride, remote.block_stride, cut)
        pages = self._pages.get(group)
        if pages is None or pages.key != key:
            pages = self._pages[group] = self._find_pages(group, key)
        return PageWrites(
            layer.base + pages.source,
            remote.base + pages.destination,
            pages.nbytes,
            self.out.marks[index],
            pages.total_bytes,
        )

    def _find_pages(self, group: int, key: tuple[int, int, int, int, Slice]) -> _Pages:
        begin, end, stride_here, stride_there, cut = key
        first = self._first_page[group]
        here = self.out.blocks[group][begin:end]
        there = self._blocks[group][begin - first : end - first]
        wanted = there != NULL_BLOCK
        if (here[wanted] == NULL_BLOCK).any():
            raise ValueError("decode asks for pages that have left the attention window here")
        here, there = here[wanted], there[wanted]
        return _Pages(
            key,
            here * stride_here + cut.source,
            there * stride_there + cut.target,
            np.full(len(here), cut.nbytes, dtype=np.int64),
            cut.nbytes * len(here),
        )


def _join(parts: list[PageWrites]) -> PageWrites:
    return PageWrites(
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.destination for part in parts]),
        np.concatenate([part.nbytes for part in parts]),
        0,
        sum(part.total_bytes for part in parts),
    )
