# SPDX-License-Identifier: Apache-2.0
"""Bytes, signals and messages arrive as they should."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.node import EXAMPLES, PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.conftest import Pair

Row = tuple[int, int, int]
REGION = 1 << 20


@st.composite
def scattered_rows(draw: st.DrawFn) -> list[Row]:
    """Rows (src, dst, nbytes) with disjoint destinations, in any order, some of them adjacent."""
    pieces = draw(st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([0, 0, 1, 64, 5000])),
                           min_size=1, max_size=60))  # fmt: skip
    rows: list[Row] = []
    src, dst = 0, draw(st.integers(0, 100))
    for nbytes, gap in pieces:
        rows.append((src, dst, nbytes))
        src += nbytes + draw(st.sampled_from([0, 0, gap]))
        dst += nbytes + gap
    return draw(st.permutations(rows)) if draw(st.booleans()) else rows


def joined(rows: list[Row]) -> list[Row]:
    """The plain reference of coalescing."""
    runs: list[Row] = []
    for src, dst, nbytes in rows:
        if nbytes == 0:
            continue
        if runs and runs[-1][0] + runs[-1][2] == src and runs[-1][1] + runs[-1][2] == dst:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + nbytes)
        else:
            runs.append((src, dst, nbytes))
    return runs


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=scattered_rows(), seed=st.integers(0, 2**32 - 1))
def test_scattered_ranges_land_and_nothing_else_changes(
    pair: Pair, rows: list[Row], seed: int
) -> None:
    near, far = pair
    near.load(0, np.random.default_rng(seed).bytes(REGION))
    far.call("fill", 0xEE)
    expected = np.full(REGION, 0xEE, np.uint8)
    for src, dst, nbytes in rows:
        expected[dst : dst + nbytes] = near.buffer[src : src + nbytes]
    before = near.stats()
    transfer = near.write(*map(list, zip(*rows, strict=True)))
    near.signal(seed)
    assert far.call("next_event", "IMM").imm == seed
    assert far.call("dump", 0, REGION) == expected.tobytes()
    assert near.next_event("TRANSFER_DONE").id == transfer
    after = near.stats()
    assert after["descriptors_in"] - before["descriptors_in"] == len(rows)
    assert after["descriptors_out"] - before["descriptors_out"] == len(joined(rows))


def test_an_empty_write_is_done(pair: Pair) -> None:
    near, _ = pair
    transfers = [near.write([], [], []), near.write([0, 5], [0, 5], [0, 0])]
    assert [near.next_event("TRANSFER_DONE").id for _ in transfers] == transfers


@pytest.mark.parametrize("config", [{}, {"qps_per_peer": 4, "block_size": 4096, "spin_us": 50}])
def test_a_signal_never_overtakes_its_writes(
    make_pair: Callable[..., Pair], config: dict[str, int]
) -> None:
    near, far = make_pair(**config)
    pieces = 16
    piece = near.buffer.nbytes // pieces
    near.load(0, np.random.default_rng(1).bytes(near.buffer.nbytes))
    for imm in range(pieces):
        # Page by page backwards, so that nothing coalesces and every lane is busy.
        pages = list(range(imm * piece, (imm + 1) * piece, 4096))[::-1]
        near.write(pages, pages, [4096] * len(pages))
        near.signal(imm)
    for imm in range(pieces):
        assert far.call("next_event", "IMM").imm == imm
        assert far.call("digest", imm * piece, piece) == near.digest(imm * piece, piece)


def test_a_full_queue_is_back_pressure(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(queue_depth=2, block_size=4096)
    near.load(0, np.random.default_rng(2).bytes(near.buffer.nbytes))
    start = time.monotonic()
    pages = list(range(0, near.buffer.nbytes, 4096))
    transfers = [near.write(pages, pages[::-1], [4096] * len(pages)) for _ in range(3)]
    assert time.monotonic() - start < PATIENCE, "write() must not wait for room"
    near.signal(1)
    in_flight = {int(near.peer_stats()["slices_in_flight"]) for _ in range(50)}
    assert max(in_flight) <= 2
    assert [near.next_event("TRANSFER_DONE").id for _ in transfers] == transfers
    far.call("next_event", "IMM")
    assert far.call("dump", 0, 4096) == near.dump(near.buffer.nbytes - 4096, 4096)


def test_messages_keep_their_order(pair: Pair) -> None:
    near, far = pair
    source = random.Random(3)
    messages = [source.randbytes(n) for n in [0, 1, 1 << 20, 17, *[300] * 200, 1 << 20, 0]]
    for message in messages:
        near.send(message)
        far.call("send", message[:10])
    for message in messages:
        assert far.call("next_event", "MESSAGE").data == message
        assert near.next_event("MESSAGE").data == message[:10]
    with pytest.raises(ValueError, match="at most 1048576"):
        near.send(bytes((1 << 20) + 1))


def test_writes_and_messages_queued_before_connected_go_out(
    make_pair: Callable[..., Pair],
) -> None:
    near, far = make_pair(connected=False)
    near.fill(7)
    near.connect(far.call("invite"))
    near.write([0], [0], [1000])
    near.signal(9)
    near.send(b"early")
    time.sleep(0.2)  # the other side's hellos are parked meanwhile, whoever dials
    far.call("connect", near.invite())
    assert far.call("next_event", "IMM").imm == 9
    assert far.call("next_event", "MESSAGE").data == b"early"
    assert far.call("dump", 0, 1001) == bytes([7]) * 1000 + b"\0"


def test_both_directions_at_once(pair: Pair) -> None:
    near, far = pair
    half = near.buffer.nbytes // 2
    near.load(0, np.random.default_rng(4).bytes(half))
    pages = list(range(0, half, 16384))
    targets = [half + page for page in pages[::-1]]
    for imm in range(4):
        near.write(pages, targets, [16384] * len(pages))
        far.call("write", pages, targets, [16384] * len(pages))
        near.signal(imm)
        far.call("signal", imm)
    for imm in range(4):
        assert near.next_event("IMM").imm == imm
        assert far.call("next_event", "IMM").imm == imm
    assert far.call("dump", targets[0], 16384) == near.dump(0, 16384)
    assert near.dump(targets[0], 16384) == far.call("dump", 0, 16384)
