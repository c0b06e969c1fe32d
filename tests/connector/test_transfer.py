# SPDX-License-Identifier: Apache-2.0
"""Transfers between two worker sides: content, exactly-once reports, refusals, fences."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.connector.pair import LAYERS, Side, chunk, end, load, meet, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    MakePair = Callable[..., tuple[Side, Side]]

RNG = np.random.default_rng(7)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[MakePair]:
    """Factory of a connected prefill and decode side with these settings."""
    sides: list[Side] = []

    def make(*, connect: bool = True, **settings: object) -> tuple[Side, Side]:
        prefill = Side(tmp_path, "prefill-0", 11, prefill=True, **settings)
        decode = Side(tmp_path, "decode-0", 22, prefill=False, **settings)
        sides.extend((prefill, decode))
        prefill.kv[:] = RNG.integers(0, 256, prefill.kv.shape, dtype=np.uint8)
        if connect:
            meet(prefill, decode)
            until(lambda: prefill.rank.connected() and decode.rank.connected(), "connected")
        return prefill, decode

    yield make
    for side in sides:
        side.worker.shutdown()


def received(decode: Side) -> tuple[set[str], set[int]]:
    """Wait for the next report of the decode side: (request ids, failed blocks)."""
    found: set[str] = set()

    def any_report() -> bool:
        found.update(decode.worker.take_finished()[1])
        return bool(found)

    until(any_report, "a report of decode")
    return found, decode.worker.take_failed_blocks()


def sent(prefill: Side) -> set[str]:
    """Wait for the next report of the prefill side."""
    found: set[str] = set()

    def any_report() -> bool:
        found.update(prefill.worker.take_finished()[0])
        return bool(found)

    until(any_report, "a report of prefill")
    return found


def test_register_before_prefill_and_after(pair: MakePair) -> None:
    prefill, decode = pair(checksum=True)
    for transfer, early in (("early", True), ("late", False)):
        if early:
            decode.begin(loads=[load([9, 8, 7], 10, transfer)])
            time.sleep(0.05)
        prefill.step(chunks=[chunk([1, 2, 3], 10, 10, transfer)])
        prefill.begin(ends=[end(transfer)])
        if not early:
            assert prefill.worker.take_finished()[0] == set()
            decode.begin(loads=[load([9, 8, 7], 10, transfer)])
        assert received(decode) == ({f"d-{transfer}"}, set())
        assert (decode.kv[:, [9, 8, 7]] == prefill.kv[:, [1, 2, 3]]).all()
        assert sent(prefill) == {f"p-{transfer}"}
        decode.kv[:] = 0
    stats = decode.worker.take_stats()
    assert stats is not None
    assert stats.data["checksum_pages"] == 2 * 3 * LAYERS
    # Nothing is reported twice.
    assert decode.worker.take_finished() == (set(), set(), set())
    assert prefill.worker.take_finished()[0] == set()


def test_layers_arrive_while_the_step_goes_on(pair: MakePair) -> None:
    prefill, decode = pair()
    decode.begin(loads=[load([5], 4)])
    time.sleep(0.05)
    prefill.begin(chunks=[chunk([1], 4, 4)])
    prefill.worker.layer_computed("l0")
    until(lambda: bool((decode.kv[0, 5] == prefill.kv[0, 1]).all()), "layer 0 arrived alone")
    assert not decode.kv[1:, 5].any()
    prefill.worker.layer_computed("l1")
    prefill.worker.layer_computed("l2")
    assert received(decode) == ({"d-t"}, set())


def test_a_damaged_page_is_found_and_recomputed(pair: MakePair) -> None:
    prefill, decode = pair(checksum=True)
    decode.begin(loads=[load([5, 6], 8)])
    time.sleep(0.05)
    prefill.begin(chunks=[chunk([1, 2], 8, 8)])
    prefill.worker.layer_computed("l0")
    until(lambda: bool(decode.kv[0, 6].any()), "layer 0 arrived")
    time.sleep(0.05)
    decode.kv[0, 6, 0] ^= 1
    prefill.worker.layer_computed("l1")
    prefill.worker.layer_computed("l2")
    assert received(decode) == ({"d-t"}, {5, 6})


def test_a_late_register_is_refused_after_the_lease(pair: MakePair) -> None:
    prefill, decode = pair(lease_s=0.3)
    prefill.step(chunks=[chunk([1], 4, 4)])
    prefill.begin(ends=[end()])
    assert sent(prefill) == {"p-t"}
    decode.begin(loads=[load([5], 4)])
    assert received(decode) == ({"d-t"}, {5})


def test_renewed_leases_hold(pair: MakePair) -> None:
    from rdma_kv_cache.connector.metadata import RemoteTransfer

    prefill, decode = pair(lease_s=0.6)
    decode.begin(expected=[RemoteTransfer("t", "prefill-0")])
    prefill.step(chunks=[chunk([1], 4, 4)])
    prefill.begin(ends=[end()])
    time.sleep(1.5)
    assert prefill.worker.take_finished()[0] == set()
    decode.begin(loads=[load([5], 4)])
    assert received(decode) == ({"d-t"}, set())


def test_the_rank_is_told_the_way_to_the_peer(pair: MakePair) -> None:
    for side in pair():
        path = side.rank.states[-1].path
        assert path is not None
        assert path.backend == "tcp"
        assert path.description.startswith("tcp")


def test_release_frees_prefill(pair: MakePair) -> None:
    from rdma_kv_cache.connector.metadata import RemoteTransfer

    prefill, decode = pair()
    decode.begin(releases=[RemoteTransfer("t", "prefill-0")])
    time.sleep(0.05)
    prefill.step(chunks=[chunk([1], 4, 4)])
    prefill.begin(ends=[end()])
    assert sent(prefill) == {"p-t"}


@pytest.mark.parametrize("started", [False, True])
def test_an_aborted_prefill_is_refused_at_once(pair: MakePair, started: bool) -> None:
    prefill, decode = pair()
    decode.begin(loads=[load([5, 6], 8)])
    time.sleep(0.05)
    if started:
        prefill.step(chunks=[chunk([1], 8, 4)])
        prefill.begin(ends=[end(complete=False)])
        assert sent(prefill) == {"p-t"}
    else:
        from rdma_kv_cache.connector.metadata import PrefillEnd

        prefill.begin(ends=[PrefillEnd("p-t", "t", complete=False, held=False)])
    assert received(decode) == ({"d-t"}, {5, 6})


def test_a_cancelled_load_ends_without_failed_blocks(pair: MakePair) -> None:
    prefill, decode = pair()
    decode.begin(loads=[load([5, 6], 8)])
    time.sleep(0.05)
    prefill.step(chunks=[chunk([1], 8, 4)])
    decode.begin(cancels=["d-t"])
    assert received(decode) == ({"d-t"}, set())
    before = decode.kv.copy()
    prefill.step(chunks=[chunk([1, 2], 8, 8)])
    prefill.begin(ends=[end()])
    assert sent(prefill) == {"p-t"}
    time.sleep(0.1)
    assert (decode.kv == before).all()


def test_a_prefill_that_never_comes_is_cancelled_at_the_deadline(pair: MakePair) -> None:
    _, decode = pair(transfer_timeout_s=0.4)
    began = time.monotonic()
    decode.begin(loads=[load([5], 4)])
    assert received(decode) == ({"d-t"}, {5})
    assert 0.4 <= time.monotonic() - began < 2.0


def test_a_closed_peer_fails_its_loads_and_frees_its_blocks(pair: MakePair) -> None:
    prefill, decode = pair()
    decode.begin(loads=[load([5, 6], 8)])
    time.sleep(0.05)
    prefill.step(chunks=[chunk([1], 8, 4)])
    prefill.worker.shutdown()
    assert received(decode) == ({"d-t"}, {5, 6})
    until(lambda: not decode.rank.connected(), "the rank knows")


def test_a_lost_decode_engine_frees_prefill(pair: MakePair) -> None:
    prefill, decode = pair()
    decode.begin(loads=[load([5, 6], 8)])
    time.sleep(0.05)
    prefill.step(chunks=[chunk([1], 8, 4)])
    decode.worker.shutdown()
    prefill.step(chunks=[chunk([1, 2], 8, 8)])
    prefill.begin(ends=[end()])
    assert sent(prefill) == {"p-t"}


def test_two_living_engines_reconnect(pair: MakePair) -> None:
    prefill, decode = pair()
    peer = decode.worker._peers.find("prefill-0", 0)
    assert peer is not None
    with decode.worker._lock:
        decode.worker._fence(peer, "test: the cable was pulled")
    until(lambda: not prefill.rank.connected(), "prefill noticed")
    until(lambda: prefill.rank.connected() and decode.rank.connected(), "connected again")
    decode.begin(loads=[load([5], 4)])
    prefill.step(chunks=[chunk([1], 4, 4)])
    assert received(decode) == ({"d-t"}, set())


def test_a_restarted_prefill_is_told_apart(pair: MakePair, tmp_path: Path) -> None:
    prefill, decode = pair()
    prefill.worker.shutdown()
    reborn = Side(tmp_path, "prefill-0", 12, prefill=True)
    reborn.kv[:] = 7
    meet(reborn, decode)
    until(lambda: reborn.rank.connected() and decode.rank.connected(), "connected")
    decode.begin(loads=[load([5], 4, "old", incarnation=11)])
    assert received(decode) == ({"d-old"}, {5})
    decode.begin(loads=[load([5], 4, "new", incarnation=12)])
    reborn.step(chunks=[chunk([1], 4, 4, "new")])
    assert received(decode) == ({"d-new"}, set())
    assert (decode.kv[:, 5] == 7).all()
    reborn.worker.shutdown()


def test_incompatible_engines_name_the_first_difference(tmp_path: Path) -> None:
    prefill = Side(tmp_path, "prefill-0", 1, prefill=True, model="llama")
    decode = Side(tmp_path, "decode-0", 2, prefill=False, model="qwen")
    meet(prefill, decode)
    until(lambda: bool(prefill.rank.states and decode.rank.states), "refused")
    assert not prefill.rank.connected()
    assert "model: llama here, qwen there" in prefill.rank.states[0].reason
    prefill.worker.shutdown()
    decode.worker.shutdown()


@pytest.mark.parametrize("blocks", [[5, 6, 7], [10_000]])
def test_a_wrong_register_is_refused_and_harms_nothing(pair: MakePair, blocks: list[int]) -> None:
    prefill, decode = pair()
    decode.begin(loads=[load(blocks, 4)])
    time.sleep(0.05)
    prefill.step(chunks=[chunk([1], 4, 4)])
    prefill.begin(ends=[end()])
    assert received(decode) == ({"d-t"}, set(blocks))
    assert sent(prefill) == {"p-t"}
    decode.begin(loads=[load([5], 4, "good")])
    prefill.step(chunks=[chunk([1], 4, 4, "good")])
    assert received(decode) == ({"d-good"}, set())


def test_preempted_blocks_are_not_read_any_more(pair: MakePair) -> None:
    from rdma_kv_cache.connector.metadata import StepMetadata

    prefill, decode = pair()
    decode.begin(loads=[load([5, 6], 8)])
    time.sleep(0.05)
    prefill.step(chunks=[chunk([1], 8, 4)])
    prefill.worker.preempt(StepMetadata(preempted=["p-t"]))
    first = prefill.kv[:, 1].copy()
    prefill.kv[:, 1] = 0
    prefill.step(chunks=[chunk([3, 4], 8, 8)])
    assert received(decode) == ({"d-t"}, set())
    assert (decode.kv[:, 5] == first).all()
    assert (decode.kv[:, 6] == prefill.kv[:, 4]).all()
