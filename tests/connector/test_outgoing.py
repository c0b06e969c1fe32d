# SPDX-License-Identifier: Apache-2.0
"""Which pages are written when: any chunking, any REGISTER time, any prefix hit on decode."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_kv_cache.connector.heads import Slice
from rdma_kv_cache.connector.layout import KVLayout, Layer
from rdma_kv_cache.connector.metadata import PrefillChunk
from rdma_kv_cache.connector.outgoing import Outgoing, PageWrites

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK_TOKENS = 4
PAGE_BYTES = 64
NUM_BLOCKS = 32
LAYERS = 3


def layout(base: int) -> KVLayout:
    """Three layers of one group, one after the other from `base`."""
    layer_bytes = NUM_BLOCKS * PAGE_BYTES
    layers = tuple(
        Layer(f"layer.{i}", 0, base + i * layer_bytes, PAGE_BYTES, PAGE_BYTES)
        for i in range(LAYERS)
    )
    return KVLayout(layers, (BLOCK_TOKENS,), NUM_BLOCKS, ((base, LAYERS * layer_bytes),))


@dataclass
class Case:
    """One prefill: chunk ends, when REGISTER comes, and how many pages decode has already."""

    prompt: int
    chunk_ends: list[int]
    register_before_event: int
    local_hit_pages: int
    source_blocks: list[int]
    target_blocks: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prompt = draw(st.integers(1, 80))
    cuts = draw(st.sets(st.integers(1, prompt), max_size=5)) | {prompt}
    pages = -(-prompt // BLOCK_TOKENS)
    hit = draw(st.integers(0, (prompt - 1) // BLOCK_TOKENS))
    blocks = st.permutations(range(1, NUM_BLOCKS))
    return Case(
        prompt,
        sorted(cuts),
        draw(st.integers(0, len(cuts) * (LAYERS + 1))),
        hit,
        draw(blocks)[:pages],
        draw(blocks)[: pages - hit],
    )


def peer_at(there: KVLayout) -> Any:
    """A decode worker of the same TP rank."""
    whole = [Slice(0, 0, PAGE_BYTES)] * LAYERS
    return SimpleNamespace(
        native=1, fan_out=1, slices=whole, remote=SimpleNamespace(layers=there.describe())
    )


def take(out: Outgoing, layers: Iterable[int]) -> PageWrites | None:
    """What can be written of these layers."""
    parts = [w for d in out.deliveries.values() for w in d.take_writes(layers, lambda _: True)]
    assert len(parts) < 2
    return parts[0] if parts else None


def computed(out: Outgoing, tokens: int) -> None:
    """All layers have this many tokens."""
    for index in range(LAYERS):
        out.layer_done(index, tokens, 0)


def run(case: Case) -> tuple[dict[int, int], list[int], int]:
    """Play a prefill; returns {destination: source} of all writes, event sizes, writes twice."""
    here, there = layout(1 << 20), layout(1 << 30)
    out = Outgoing("r", "t", case.prompt, here)
    peer = peer_at(there)
    written: dict[int, int] = {}
    sizes: list[int] = []
    twice = 0

    def flush(layers: range) -> None:
        nonlocal twice
        writes = take(out, layers)
        if writes is None:
            return
        sizes.append(len(writes.nbytes))
        assert set(writes.nbytes.tolist()) == {PAGE_BYTES}
        for source, destination in zip(
            writes.source.tolist(), writes.destination.tolist(), strict=True
        ):
            twice += destination in written
            written[destination] = source

    event, known_blocks = 0, 0
    for end in case.chunk_ends:
        upto = -(-end // BLOCK_TOKENS)
        # A chunk inside a known page brings no group at all, as vLLM does.
        ids = (new,) if (new := case.source_blocks[known_blocks:upto]) else ()
        out.add_chunk(PrefillChunk("r", "t", case.prompt, end, ids, known_blocks == 0))
        known_blocks = upto
        for step in range(LAYERS + 1):
            if event == case.register_before_event:
                out.add_target(peer, 7, [case.target_blocks], 0.0)
                flush(range(LAYERS))
            event += 1
            if step < LAYERS:
                out.layer_done(step, end, 0)
                flush(range(step, step + 1))
    if not out.deliveries:
        out.add_target(peer, 7, [case.target_blocks], 0.0)
        flush(range(LAYERS))
    assert all(d.all_sent() for d in out.deliveries.values())
    return written, sizes, twice


@given(cases())
def test_every_wanted_page_is_written_once_from_its_own_source(case: Case) -> None:
    here, there = layout(1 << 20), layout(1 << 30)
    written, _, twice = run(case)
    expected = {
        t.base + case.target_blocks[page - case.local_hit_pages] * PAGE_BYTES: s.base
        + case.source_blocks[page] * PAGE_BYTES
        for s, t in zip(here.layers, there.layers, strict=True)
        for page in range(case.local_hit_pages, -(-case.prompt // BLOCK_TOKENS))
    }
    assert written == expected
    assert twice == 0


def test_a_partial_page_waits_for_the_last_chunk() -> None:
    out = Outgoing("r", "t", 10, layout(1 << 20))
    peer = peer_at(layout(1 << 30))
    out.add_target(peer, 1, [[1, 2, 3]], 0.0)
    out.add_chunk(PrefillChunk("r", "t", 10, 6, ([5, 6],), True))
    computed(out, 6)
    writes = take(out, [0])
    assert writes is not None
    assert len(writes.nbytes) == 1
    out.add_chunk(PrefillChunk("r", "t", 10, 10, ([7],), False))
    computed(out, 10)
    writes = take(out, [0])
    assert writes is not None
    assert writes.source.tolist() == [(1 << 20) + 6 * PAGE_BYTES, (1 << 20) + 7 * PAGE_BYTES]


def test_a_preempted_request_sends_only_what_was_not_sent() -> None:
    out = Outgoing("r", "t", 8, layout(1 << 20))
    peer = peer_at(layout(1 << 30))
    out.add_target(peer, 1, [[1, 2]], 0.0)
    out.add_chunk(PrefillChunk("r", "t", 8, 4, ([5],), True))
    computed(out, 4)
    assert take(out, range(LAYERS)) is not None
    out.restart()
    assert take(out, range(LAYERS)) is None
    out.add_chunk(PrefillChunk("r", "t", 8, 8, ([9, 10],), True))
    computed(out, 8)
    writes = take(out, range(LAYERS))
    assert writes is not None
    assert np.unique((writes.source - (1 << 20)) // PAGE_BYTES % NUM_BLOCKS).tolist() == [10]
    assert all(d.all_sent() for d in out.deliveries.values())


def test_a_register_for_another_prompt_is_refused() -> None:
    out = Outgoing("r", "t", 8, layout(1 << 20))
    peer = peer_at(layout(1 << 30))
    with pytest.raises(ValueError, match="another prompt or tokenizer"):
        out.add_target(peer, 1, [[1, 2, 3]], 0.0)
