# SPDX-License-Identifier: Apache-2.0
"""Transfers between engines of different TP sizes, each worker with an engine of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rdma_kv_cache.connector.heads import held
from tests.connector.pair import (
    KV_HEADS,
    LAYERS,
    NUM_BLOCKS,
    PAGE_BYTES,
    Side,
    chunk,
    end,
    load,
    meet_all,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Engines = tuple[list[Side], list[Side]]
    MakeEngines = Callable[..., Engines]

HEAD_BYTES = PAGE_BYTES // KV_HEADS
MODEL = np.random.default_rng(3).integers(
    1, 256, (LAYERS, NUM_BLOCKS, KV_HEADS, HEAD_BYTES), dtype=np.uint8
)


def heads_of(side_rank: int, tp_size: int) -> np.ndarray:
    """The pages of one rank: its heads of MODEL, shape (layers, blocks, page bytes)."""
    part = MODEL[:, :, list(held(KV_HEADS, tp_size, side_rank))]
    return part.reshape(LAYERS, NUM_BLOCKS, -1)


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[MakeEngines]:
    """Factory of the workers of a prefill and a decode engine, introduced to each other."""
    sides: list[Side] = []

    def make(prefill_tp: int, decode_tp: int, **settings: object) -> Engines:
        made: Engines = ([], [])
        for which, (name, tp_size) in enumerate(
            (("prefill-0", prefill_tp), ("decode-0", decode_tp))
        ):
            for rank in range(tp_size):
                side = Side(
                    tmp_path, name, 11 + which, prefill=which == 0, tp_rank=rank, tp_size=tp_size,
                    **settings,
                )  # fmt: skip
                made[which].append(side)
                sides.append(side)
                if which == 0:
                    side.kv[:] = heads_of(rank, tp_size)
        meet_all(*made)
        return made

    yield make
    for side in sides:
        side.worker.shutdown()


def connected(made: Engines) -> None:
    until(lambda: all(s.rank.connected() for side in made for s in side), "all pairs connected")


def ended(sides: list[Side], which: int) -> list[set[str]]:
    """Wait until each side has reported; `which`: 0 what prefill sent, 1 what decode received."""
    found: list[set[str]] = [set() for _ in sides]

    def all_reported() -> bool:
        for side, reports in zip(sides, found, strict=True):
            reports.update(side.worker.take_finished()[which])
        return all(found)

    until(all_reported, "a report of each rank")
    return found


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (4, 2), (2, 2), (1, 8), (8, 2)])
def test_each_decode_rank_gets_its_heads(engines: MakeEngines, sizes: tuple[int, int]) -> None:
    prefill, decode = made = engines(*sizes, checksum=True)
    connected(made)
    for side in decode:
        side.begin(loads=[load([9, 8, 7], 10)])
    for side in prefill:
        side.step(chunks=[chunk([1, 2, 3], 10, 10)])
        side.begin(ends=[end()])
    assert ended(decode, 1) == [{"d-t"}] * sizes[1]
    assert ended(prefill, 0) == [{"p-t"}] * sizes[0]
    for rank, side in enumerate(decode):
        assert side.worker.take_failed_blocks() == set()
        assert (side.kv[:, [9, 8, 7]] == heads_of(rank, sizes[1])[:, [1, 2, 3]]).all()
    assert sum(side.worker.take_finished() != (set(), set(), set()) for side in decode) == 0


def test_one_lost_prefill_rank_fails_the_load_and_stops_the_other(engines: MakeEngines) -> None:
    prefill, decode = made = engines(2, 1)
    connected(made)
    decode[0].begin(loads=[load([5, 6], 8)])
    time.sleep(0.05)
    for side in prefill:
        side.step(chunks=[chunk([1], 8, 4)])
    prefill[1].worker.shutdown()
    assert ended(decode, 1) == [{"d-t"}]
    assert decode[0].worker.take_failed_blocks() == {5, 6}
    before = decode[0].kv.copy()
    prefill[0].step(chunks=[chunk([1, 2], 8, 8)])
    prefill[0].begin(ends=[end()])
    assert ended(prefill[:1], 0) == [{"p-t"}]
    assert (decode[0].kv == before).all()


def test_an_aborted_load_is_cancelled_at_every_rank(engines: MakeEngines) -> None:
    prefill, decode = made = engines(2, 1)
    connected(made)
    decode[0].begin(loads=[load([5, 6], 8)])
    time.sleep(0.05)
    for side in prefill:
        side.step(chunks=[chunk([1], 8, 4)])
    decode[0].begin(cancels=["d-t"])
    assert ended(decode, 1) == [{"d-t"}]
    assert decode[0].worker.take_failed_blocks() == set()
    for side in prefill:
        side.begin(ends=[end(complete=False)])
    assert ended(prefill, 0) == [{"p-t"}] * 2


def test_one_decode_rank_that_never_asks_ends_with_the_lease(engines: MakeEngines) -> None:
    prefill, decode = made = engines(1, 2, lease_s=0.4)
    connected(made)
    decode[0].begin(loads=[load([5], 4)])
    prefill[0].step(chunks=[chunk([1], 4, 4)])
    prefill[0].begin(ends=[end()])
    assert ended(prefill, 0) == [{"p-t"}]
    decode[1].begin(loads=[load([5], 4)])
    assert ended(decode[1:], 1) == [{"d-t"}]
    assert decode[1].worker.take_failed_blocks() == {5}


def test_scattered_heads_are_refused_by_name(engines: MakeEngines) -> None:
    prefill, _ = engines(1, 2, head_major=False)
    until(lambda: bool(prefill[0].rank.states), "refused")
    assert "tensor_parallel_size: 1 and 2" in prefill[0].rank.states[0].reason
    assert "scattered" in prefill[0].rank.states[0].reason
