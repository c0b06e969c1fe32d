# SPDX-License-Identifier: Apache-2.0
"""The bootstrap socket with real clients, friendly and hostile."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rdma_kv_cache.cluster import bootstrap_server
from rdma_kv_cache.cluster.bootstrap_server import BootstrapServer
from rdma_kv_cache.cluster.links import Links
from rdma_kv_cache.protocol.bootstrap import (
    Bundle,
    EngineHello,
    PeerDown,
    PeerState,
    PeerUp,
    ToWorker,
    WorkerHello,
    WorkerId,
)
from rdma_kv_cache.protocol.codec import MAX_FRAME_BYTES, FrameReader, decode, encode, frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

ME = EngineHello("decode-0", "decode", "host", 5, 2)
PEER = EngineHello("prefill-0", "prefill", "host", 6, 1)
PEER_WORKER = WorkerId("prefill-0", 0, 6)
WORKERS = [WorkerId("decode-0", rank, 5) for rank in range(2)]


class Rank:
    """The owner of the server: notes what it is told."""

    def __init__(self) -> None:
        self.links = Links(ME, [PEER])
        self.seen: list[Any] = []

    def worker_joined(self, hello: WorkerHello) -> Sequence[ToWorker]:
        self.seen.append(hello)
        return self.links.greeting(hello.worker)

    def worker_offers(self, bundle: Bundle) -> None:
        self.seen.append(bundle)

    def worker_reports(self, state: PeerState) -> None:
        self.seen.append(state)

    def worker_left(self, worker: WorkerId, reason: str) -> None:
        self.seen.append((worker, reason))


class Client:
    """One connection to the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = FrameReader()
        self._messages: list[Any] = []

    def send(self, *messages: Any) -> None:
        self.writer.write(b"".join(frame(encode(message)) for message in messages))

    async def receive(self) -> Any:
        """The next message; None when the server has closed the connection."""
        while not self._messages:
            try:
                data = await asyncio.wait_for(self.reader.read(1 << 16), 5)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._messages += [decode(body, ToWorker) for body in self._frames.feed(data)]
        return self._messages.pop(0)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[BootstrapServer, Rank]]:
    rank = Rank()
    server = BootstrapServer(ME, rank)
    await server.start()
    try:
        yield server, rank
    finally:
        await server.close()


async def connect(server: BootstrapServer) -> Client:
    return Client(*await asyncio.open_unix_connection(server.path))


def hello(worker: WorkerId = WORKERS[0], role: str = "decode") -> WorkerHello:
    return WorkerHello(worker, role, os.getpid(), "tcp", "tcp")


async def settle(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("did not settle")


def test_workers_are_greeted_and_heard() -> None:
    bundle = Bundle(WORKERS[0], PEER_WORKER, os.urandom(300_000))
    state = PeerState(WORKERS[0], PEER_WORKER, connected=True)
    answer = Bundle(PEER_WORKER, WORKERS[1], b"early")

    async def main() -> None:
        async with serving() as (server, rank):
            rank.links.receive(answer)
            first, second = await connect(server), await connect(server)
            first.send(hello(), bundle, state)
            second.send(hello(WORKERS[1]))
            assert await first.receive() == PeerUp("prefill-0", 6, 1)
            assert await second.receive() == PeerUp("prefill-0", 6, 1)
            assert await second.receive() == answer
            await settle(lambda: len(rank.seen) == 4)
            assert [item for item in rank.seen if item == bundle] == [bundle]
            assert state in rank.seen
            assert server.workers == 2
            down = PeerDown("prefill-0", 6, "gone")
            server.broadcast([down])
            assert await first.receive() == await second.receive() == down
            server.send(1, answer)
            assert await second.receive() == answer
            second.writer.close()
            await settle(lambda: server.workers == 1)
            assert rank.seen[-1] == (WORKERS[1], "connection closed")

    asyncio.run(main())


def test_the_folder_is_private_and_goes_away() -> None:
    async def main() -> Path:
        async with serving() as (server, _):
            folder = Path(server.path).parent
            assert folder.stat().st_mode & 0o777 == 0o700
            assert folder.stat().st_uid == os.getuid()
            return folder

    assert not asyncio.run(main()).exists()


def test_a_long_temporary_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    async def main() -> None:
        async with serving() as (server, _):
            assert len(server.path) < 108
            await connect(server)

    asyncio.run(main())


HOSTILE = {
    "random": random.Random(1).randbytes(5000),
    "oversized frame": struct.pack("<I", MAX_FRAME_BYTES + 1) + b"x",
    "empty frame": frame(b""),
    "not msgpack": frame(b"\xc1" * 10),
    "a pickle": frame(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "text": b"GET / HTTP/1.1\r\n\r\n" * 20,
    "a bundle before the hello": frame(encode(Bundle(WORKERS[0], PEER_WORKER, b""))),
    "a message of a rank": frame(encode(PeerUp("prefill-0", 6, 1))),
    "another engine": frame(encode(hello(WorkerId("decode-1", 0, 5)))),
    "another incarnation": frame(encode(hello(WorkerId("decode-0", 0, 4)))),
    "another role": frame(encode(hello(role="prefill"))),
    "no such TP rank": frame(encode(hello(WorkerId("decode-0", 2, 5)))),
    "negative TP rank": frame(encode(hello(WorkerId("decode-0", -1, 5)))),
}
AFTER_HELLO = {
    "second hello": hello(),
    "a bundle of another worker": Bundle(WORKERS[1], PEER_WORKER, b""),
    "a state of another worker": PeerState(WORKERS[1], PEER_WORKER, connected=True),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_close_only_their_own_connection(name: str) -> None:
    async def main() -> None:
        async with serving() as (server, rank):
            good, bad = await connect(server), await connect(server)
            good.send(hello(WORKERS[1]))
            assert await good.receive() is not None
            bad.writer.write(HOSTILE[name])
            assert await bad.receive() is None
            good.send(PeerState(WORKERS[1], PEER_WORKER, connected=True))
            await settle(lambda: len(rank.seen) == 2)
            assert server.workers == 1

    asyncio.run(main())


@pytest.mark.parametrize("name", AFTER_HELLO)
def test_a_worker_speaks_only_for_itself(name: str) -> None:
    async def main() -> None:
        async with serving() as (server, rank):
            client = await connect(server)
            client.send(hello())
            assert await client.receive() is not None
            client.send(AFTER_HELLO[name])
            assert await client.receive() is None
            assert [type(item) for item in rank.seen] == [WorkerHello, tuple]

    asyncio.run(main())


def test_a_second_connection_of_a_worker_is_refused() -> None:
    async def main() -> None:
        async with serving() as (server, _):
            first, second = await connect(server), await connect(server)
            first.send(hello())
            assert await first.receive() is not None
            second.send(hello())
            assert await second.receive() is None
            assert server.workers == 1

    asyncio.run(main())


def test_truncated_and_silent_connections_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap_server, "HELLO_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with serving() as (server, rank):
            truncated, silent, gone = [await connect(server) for _ in range(3)]
            truncated.writer.write(frame(encode(hello()))[:-3])
            gone.writer.close()
            assert await silent.receive() is None
            assert await truncated.receive() is None
            assert rank.seen == []

    asyncio.run(main())
