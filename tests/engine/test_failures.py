# SPDX-License-Identifier: Apache-2.0
"""What happens when a peer dies, hangs, is fenced, or never comes. Real signals, real sockets."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rdma_kv_cache._native import Engine
from tests.engine.node import PEER_TIMEOUT_S, SLACK_S, make_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.conftest import Pair
    from tests.engine.node import Node, Seen

#: How each backend names a write for which the peer has no memory: the check of its own protocol,
#: or the NIC's.
NO_MEMORY = ("names no memory registered here", "the peer refused the address or rkey")


def queue_large_writes(near: Node, count: int = 8) -> list[int]:
    pages = list(range(0, near.buffer.nbytes, 8192))
    return [near.write(pages, pages[::-1], [8192] * len(pages)) for _ in range(count)]


def expect_lost_after_every_end(near: Node, transfers: list[int], timeout_s: float) -> Seen:
    lost = near.next_event("PEER_LOST", timeout_s)
    ends = [event for event in near.seen if event.kind.startswith("TRANSFER_")]
    assert sorted(event.id for event in ends) == transfers, "each write ends exactly once"
    assert near.kinds()[-1] == "PEER_LOST"
    time.sleep(0.2)
    assert near.engine.poll() == [], "nothing of a lost peer follows"
    with pytest.raises(RuntimeError, match="create a new endpoint"):
        near.write([0], [0], [1])
    with pytest.raises(RuntimeError, match="create a new endpoint"):
        near.send(b"x")
    return lost


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_peer_is_lost_at_once(make_pair: Callable[..., Pair], busy: bool) -> None:
    near, far = make_pair(peer_timeout_s=60.0)
    transfers = queue_large_writes(near) if busy else []
    far.process.kill()
    lost = expect_lost_after_every_end(near, transfers, PEER_TIMEOUT_S + SLACK_S)
    assert "peer-of-11" in lost.reason


@pytest.mark.parametrize("busy", [False, True])
def test_a_stopped_peer_is_lost_within_peer_timeout(
    make_pair: Callable[..., Pair], busy: bool
) -> None:
    near, far = make_pair(nbytes=32 << 20, peer_timeout_s=PEER_TIMEOUT_S)
    os.kill(far.process.pid or 0, signal.SIGSTOP)
    start = time.monotonic()
    transfers = queue_large_writes(near) if busy else []
    lost = expect_lost_after_every_end(near, transfers, PEER_TIMEOUT_S + SLACK_S)
    assert time.monotonic() - start > PEER_TIMEOUT_S / 2
    assert "peer_timeout_s" in lost.reason
    # Once it goes on it must learn that it was fenced.
    os.kill(far.process.pid or 0, signal.SIGCONT)
    assert far.call("next_event", "PEER_LOST").reason


def test_an_idle_pair_stays_connected_by_heartbeats(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(peer_timeout_s=PEER_TIMEOUT_S)
    time.sleep(2.5 * PEER_TIMEOUT_S)
    near.write([0], [0], [10])
    near.signal(1)
    far.call("next_event", "IMM")
    assert "PEER_LOST" not in near.kinds()


def test_nothing_lands_after_close_peer(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(nbytes=32 << 20)
    far.call("hammer")
    while not near.buffer.any():
        time.sleep(0.01)
    near.close_peer()
    fenced = near.buffer.copy()
    time.sleep(0.3)
    assert (near.buffer == fenced).all()
    assert "close_peer() was called" in far.call("next_event", "PEER_LOST").reason
    with pytest.raises(ValueError, match="no peer"):
        near.write([0], [0], [1])
    near.close_peer()  # fenced already


def test_close_peer_fails_its_outstanding_writes(make_pair: Callable[..., Pair]) -> None:
    near, _ = make_pair(nbytes=32 << 20, queue_depth=4)
    transfers = queue_large_writes(near)
    near.close_peer()
    ends = [near.engine.poll(1)[0] for _ in transfers]
    assert [event.id for event in ends] == transfers
    assert ends[-1].kind.name == "TRANSFER_FAILED"
    assert "close_peer() was called" in ends[-1].reason
    assert near.engine.poll() == []


def test_nothing_lands_after_memory_is_closed(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(nbytes=32 << 20)
    far.call("hammer")
    while not near.buffer.any():
        time.sleep(0.01)
    near.close_memory()
    fenced = near.buffer.copy()
    time.sleep(0.3)
    assert (near.buffer == fenced).all()
    assert "memory" in far.call("next_event", "PEER_LOST").reason
    assert "memory" in near.next_event("PEER_LOST").reason


def test_a_stale_memory_key_is_refused_and_named(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair()
    far.call("close_memory")
    near.fill(9)
    transfer = near.write([0], [0], [100])
    failed = near.next_event("TRANSFER_FAILED")
    assert failed.id == transfer
    for reason in (near.next_event("PEER_LOST").reason, far.call("next_event", "PEER_LOST").reason):
        assert any(text in reason for text in NO_MEMORY), reason
    assert not any(far.call("dump", 0, 100))


def test_closing_unused_memory_disturbs_nobody(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair()
    spare = np.zeros(4096, np.uint8)
    near.engine.register_memory(spare.ctypes.data, spare.nbytes).close()
    with pytest.raises(ValueError, match="row 0: local"):
        near.write([spare.ctypes.data - near.base], [0], [1])
    near.signal(5)
    assert far.call("next_event", "IMM").imm == 5


def test_a_peer_that_never_connects(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(connected=False, connect_timeout_s=0.5)
    near.connect(far.call("invite"))
    transfer = near.write([0], [0], [100])
    lost = near.next_event("PEER_LOST", 0.5 + SLACK_S)
    assert "connect_timeout_s" in lost.reason
    assert near.seen[0].id == transfer


def test_a_peer_that_is_gone_before_connect(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(connected=False, connect_timeout_s=1.0)
    invitation = far.call("invite")
    far.process.kill()
    far.process.join(10)
    near.connect(invitation)
    lost = near.next_event("PEER_LOST", SLACK_S)
    assert "ECONNREFUSED" in lost.reason
    assert "still running?" in lost.reason


def test_a_closed_endpoint_refuses_the_dialer(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(connected=False)
    invitation = far.call("invite")
    far.call("close_peer")
    near.connect(invitation)  # incarnation 11 < 22: this side dials
    assert "refused our hello" in near.next_event("PEER_LOST", SLACK_S).reason
    assert far.call("stats")["refused_hellos"] >= 1


def test_a_port_that_is_not_an_engine(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(connected=False)
    invitation = far.call("invite")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        own = Engine(make_config(), 22)
        descriptor = own.create_endpoint("x").descriptor
        own.close()
        forged = descriptor.replace(_port_of(descriptor), port.to_bytes(2, "little"), 1)
        near.connect(invitation._replace(endpoint=forged))
        server.settimeout(5)
        stranger, _ = server.accept()
        with stranger:
            stranger.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))
            assert "not a hello" in near.next_event("PEER_LOST", SLACK_S).reason


def _port_of(descriptor: bytes) -> bytes:
    start = descriptor.index(b"127.0.0.1") + len(b"127.0.0.1")
    return descriptor[start : start + 2]
