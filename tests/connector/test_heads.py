# SPDX-License-Identifier: Apache-2.0
"""Engines of different TP sizes: every head of every page arrives once, from a rank that has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_kv_cache.connector.heads import held, slices, source_ranks, target_ranks
from rdma_kv_cache.connector.messages import RemoteLayer

HEAD_BYTES = 3
POWERS = [1, 2, 4, 8, 16]


def layer(kv_heads: int, tp_size: int, tp_rank: int, *, head_major: bool = True) -> RemoteLayer:
    """A layer as a rank of an engine describes it."""
    heads = len(held(kv_heads, tp_size, tp_rank))
    return RemoteLayer("l", 0, 0, heads * HEAD_BYTES, heads, kv_heads, head_major)


def page(kv_heads: int, tp_size: int, tp_rank: int) -> np.ndarray:
    """A page whose bytes name their head."""
    heads = np.array(held(kv_heads, tp_size, tp_rank), dtype=np.uint8)
    return np.repeat(heads + 1, HEAD_BYTES)


@given(
    st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=3),
    st.sampled_from(POWERS),
    st.sampled_from(POWERS),
)
def test_every_head_arrives_once(layers: list[int], prefill_tp: int, decode_tp: int) -> None:
    for decode_rank in range(decode_tp):
        decode = [layer(n, decode_tp, decode_rank) for n in layers]
        sources = source_ranks(decode, prefill_tp, decode_tp, decode_rank)
        got = [np.zeros(x.page_bytes, dtype=np.uint8) for x in decode]
        for rank in range(prefill_tp):
            prefill = [layer(n, prefill_tp, rank) for n in layers]
            cuts = slices(prefill, prefill_tp, rank, decode, decode_tp, decode_rank)
            assert (rank in sources) == any(cuts)
            targets = target_ranks(prefill, prefill_tp, decode_tp, rank)
            assert (decode_rank in targets) == any(cuts)
            for index, cut in enumerate(cuts):
                if cut is not None:
                    source = page(layers[index], prefill_tp, rank)
                    assert cut.source + cut.nbytes <= len(source)
                    got[index][cut.target : cut.target + cut.nbytes] += source[
                        cut.source : cut.source + cut.nbytes
                    ]
        for index, kv_heads in enumerate(layers):
            assert (got[index] == page(kv_heads, decode_tp, decode_rank)).all()


def test_holders_of_one_head_share_the_work() -> None:
    # Two heads on eight prefill ranks, for four decode ranks.
    layers = [layer(2, 4, 0)]
    assert [source_ranks(layers, 8, 4, rank) for rank in range(4)] == [{0}, {1}, {6}, {7}]


def test_one_tp_size_needs_no_heads() -> None:
    whole = [RemoteLayer("l", 0, 0, 100)]
    assert slices(whole, 2, 1, whole, 2, 1)[0] is not None
    assert slices(whole, 2, 0, whole, 2, 1) == [None]


def test_scattered_heads_are_refused_with_the_reason() -> None:
    here, there = [layer(4, 1, 0, head_major=False)], [layer(4, 2, 0)]
    with pytest.raises(ValueError, match=r"tensor_parallel_size: 1 and 2: layer l .* scattered"):
        slices(here, 1, 0, there, 2, 0)


def test_uneven_heads_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="3 KV heads cannot be dealt out to 2 TP ranks"):
        held(3, 2, 0)
    odd = [RemoteLayer("l", 0, 0, 9, 3, 4, True)]
    with pytest.raises(ValueError, match="has 3 of 4 KV heads on TP rank 0 of 2"):
        slices([layer(4, 1, 0)], 1, 0, odd, 2, 0)
