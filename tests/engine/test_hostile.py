# SPDX-License-Identifier: Apache-2.0
"""Bytes from strangers on the engine's port, and from a peer that turned hostile."""

from __future__ import annotations

import random
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.engine.node import BACKEND, PATIENCE_S, Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.conftest import Pair

HELLO = struct.Struct("<IHBB16s16sQ")
HELLO_MAGIC = 0x48564B52
FRAME = struct.Struct("<IIQB7s")
FRAME_MAGIC = 0x46564B52
ENTRY = struct.Struct("<QQQ")
WRITE, SIGNAL, ACK = 1, 2, 3
HELLO_DEADLINE_S = 5.0


class Target(NamedTuple):
    """What an endpoint descriptor of an engine on 127.0.0.1 says."""

    token: bytes
    address: tuple[str, int]


def parse(descriptor: bytes) -> Target:
    """Reads an endpoint descriptor: u32 magic, u16 version, backend, u64, token, host, u16 port."""
    start = 4 + 2 + 2 + len(BACKEND) + 8
    host = 16 + start + 2 + len(b"127.0.0.1")
    (port,) = struct.unpack_from("<H", descriptor, host)
    return Target(descriptor[start : start + 16], ("127.0.0.1", port))


def hello(
    target: Target, *, lane: int = 0, lanes: int = 2, dialer: bytes = bytes(16),
    incarnation: int = 1, magic: int = HELLO_MAGIC, version: int = 1,
) -> bytes:  # fmt: skip
    return HELLO.pack(magic, version, lane, lanes, target.token, dialer, incarnation)


def is_closed(stranger: socket.socket, timeout_s: float = PATIENCE_S) -> bool:
    stranger.settimeout(timeout_s)
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node(22, 1 << 16)
    yield node
    node.close()


@pytest.mark.parametrize("seed", range(3))
def test_garbage_is_closed_and_counted(node: Node, seed: int) -> None:
    target = parse(node.endpoint.descriptor)
    with socket.create_connection(target.address) as stranger:
        stranger.sendall(random.Random(seed).randbytes(HELLO.size * 3))
        assert is_closed(stranger)
    assert node.stats()["refused_hellos"] == 1


def test_wrong_hellos_are_closed_and_counted(node: Node) -> None:
    target = parse(node.endpoint.descriptor)
    wrong = [
        hello(target, magic=HELLO_MAGIC ^ 1),
        hello(target, version=2),
        hello(target._replace(token=bytes(16))),
        hello(target)[:-1],
        b"",
    ]
    for bytes_sent in wrong:
        with socket.create_connection(target.address) as stranger:
            stranger.sendall(bytes_sent)
            stranger.shutdown(socket.SHUT_WR)
            assert is_closed(stranger)
    assert node.stats()["refused_hellos"] == len(wrong)


def test_a_hello_of_another_endpoint_or_incarnation_is_refused(node: Node) -> None:
    peer = Node(11, 4096)
    node.connect(peer.invite())
    target = parse(node.endpoint.descriptor)
    right = parse(peer.endpoint.descriptor).token
    for bytes_sent in [
        hello(target, dialer=bytes(16), incarnation=11),
        hello(target, dialer=right, incarnation=12),
        hello(target, dialer=right, incarnation=11, lane=3),
        hello(target, dialer=right, incarnation=11, lanes=5),
    ]:
        with socket.create_connection(target.address) as stranger:
            stranger.sendall(bytes_sent)
            assert is_closed(stranger)
    assert node.stats()["refused_hellos"] == 4
    peer.connect(node.invite())  # the true peer is still welcome
    node.next_event("CONNECTED")
    peer.next_event("CONNECTED")
    peer.close()


def test_a_hello_that_never_ends_is_closed_in_time(node: Node) -> None:
    target = parse(node.endpoint.descriptor)
    with socket.create_connection(target.address) as stranger:
        stranger.sendall(hello(target)[:7])
        start = time.monotonic()
        assert is_closed(stranger, HELLO_DEADLINE_S + PATIENCE_S)
        assert time.monotonic() - start > HELLO_DEADLINE_S / 2
    assert node.stats()["refused_hellos"] == 1


def test_strangers_cannot_keep_a_peer_out(make_pair: Callable[..., Pair]) -> None:
    near, far = make_pair(connected=False)
    invitation = far.call("invite")
    target = parse(invitation.endpoint)
    strangers = [socket.create_connection(target.address) for _ in range(150)]
    try:
        near.connect(invitation)
        far.call("connect", near.invite())
        near.next_event("CONNECTED")
        assert far.call("stats")["refused_hellos"] >= 150 - 64
    finally:
        for stranger in strangers:
            stranger.close()


class HostilePeer:
    """A peer with a valid token that speaks the protocol until it stops doing so."""

    def __init__(self, node: Node) -> None:
        helper = Node(11, 4096)  # its descriptor is real; its engine is gone before it can dial
        descriptor, token = helper.endpoint.descriptor, parse(helper.endpoint.descriptor).token
        helper.close()
        node.connect(helper.invite()._replace(endpoint=descriptor))
        target = parse(node.endpoint.descriptor)
        self.lanes = [socket.create_connection(target.address) for _ in range(3)]
        for lane, connection in enumerate(self.lanes):
            connection.sendall(hello(target, lane=lane, dialer=token, incarnation=11))
            assert len(connection.recv(32, socket.MSG_WAITALL)) == 32
        self.control, self.data, _ = self.lanes
        self.control.sendall(struct.pack("<IB3x", 0, 1))  # ready
        node.next_event("CONNECTED")

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()


@pytest.fixture
def hostile(node: Node) -> Iterator[HostilePeer]:
    if BACKEND != "tcp":
        pytest.skip("speaks the frames of the tcp backend")
    hostile = HostilePeer(node)
    yield hostile
    hostile.close()


def write_frame(entries: list[tuple[int, int, int]], payload: int) -> bytes:
    table = b"".join(ENTRY.pack(*entry) for entry in entries)
    return FRAME.pack(FRAME_MAGIC, len(entries), payload, WRITE, bytes(7)) + table


def key_of(node: Node) -> int:
    return int.from_bytes(node.memory.descriptor[-8:], "little")


def test_the_hostile_peer_can_behave(node: Node, hostile: HostilePeer) -> None:
    frame = write_frame([(key_of(node), node.base + 8, 4), (key_of(node), node.base, 2)], 6)
    for byte in frame + b"abcdef":
        hostile.data.sendall(bytes([byte]))
    counts = struct.pack("<QQ", 1, 0)
    hostile.data.sendall(FRAME.pack(FRAME_MAGIC, 2, 77, SIGNAL, bytes(7)) + counts)
    assert node.next_event("IMM").imm == 77
    assert node.dump(0, 13) == b"ef" + bytes(6) + b"abcd" + bytes(1)
    assert hostile.data.recv(24, socket.MSG_WAITALL) == FRAME.pack(FRAME_MAGIC, 0, 1, ACK, bytes(7))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda key, base: b"x" * 64, "bad magic"),
        (lambda key, base: FRAME.pack(FRAME_MAGIC, 1, 1, 9, bytes(7)), "unknown type 9"),
        (lambda key, base: FRAME.pack(FRAME_MAGIC, 1, 1, WRITE, b"\1" * 7), "padding"),
        (lambda key, base: FRAME.pack(FRAME_MAGIC, 1 << 31, 1, WRITE, bytes(7)), "count"),
        (lambda key, base: FRAME.pack(FRAME_MAGIC, 1, 1 << 40, WRITE, bytes(7)), "value"),
        (lambda key, base: FRAME.pack(FRAME_MAGIC, 0, 5, ACK, bytes(7)), "acknowledgement of 5"),
        (lambda key, base: FRAME.pack(FRAME_MAGIC, 1, 5, SIGNAL, bytes(7)) + bytes(8), "lanes"),
        (lambda key, base: write_frame([(key ^ 1, base, 4)], 4) + b"evil", "names no memory"),
        (lambda key, base: write_frame([(key, base - 1, 4)], 4) + b"evil", "outside the memory"),
        (lambda key, base: write_frame([(key, base + 65533, 4)], 4) + b"evil", "outside"),
        (lambda key, base: write_frame([(key, base, 2**64 - 1)], 4) + b"evil", "outside"),
        (lambda key, base: write_frame([(key, base, 4), (key, base, 4)], 4) + b"evil", "announces"),
    ],
)
def test_a_broken_frame_costs_the_connection_and_no_byte(
    node: Node, hostile: HostilePeer, broken: Callable[[int, int], bytes], reason: str
) -> None:
    hostile.data.sendall(broken(key_of(node), node.base))
    assert reason in node.next_event("PEER_LOST", PATIENCE_S).reason
    assert not node.buffer.any()
    assert is_closed(hostile.lanes[2])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (struct.pack("<IB3x", 1 << 30, 3), "frame of 1073741824 bytes"),
        (struct.pack("<IB3x", 0, 99), "unknown type 99"),
    ],
)
def test_a_broken_control_frame_costs_the_connection(
    node: Node, hostile: HostilePeer, broken: bytes, reason: str
) -> None:
    hostile.control.sendall(broken)
    assert reason in node.next_event("PEER_LOST", PATIENCE_S).reason


def test_a_torn_batch_is_no_signal(node: Node, hostile: HostilePeer) -> None:
    # The other lane's frame never comes, so the signal that waits for it must not either.
    counts = struct.pack("<QQ", 0, 1)
    hostile.data.sendall(FRAME.pack(FRAME_MAGIC, 2, 5, SIGNAL, bytes(7)) + counts)
    with pytest.raises(TimeoutError):
        node.next_event("IMM", 0.3)
    hostile.close()
    node.next_event("PEER_LOST", PATIENCE_S)
    assert "IMM" not in node.kinds()
