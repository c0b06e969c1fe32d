# SPDX-License-Identifier: Apache-2.0
"""The unix socket on which an engine rank meets the workers of its vLLM."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rdma_kv_cache.cluster.tasks import cancel
from rdma_kv_cache.protocol.bootstrap import Bundle, FromWorker, WorkerHello
from rdma_kv_cache.protocol.codec import FrameReader, ProtocolError, decode, encode, frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from rdma_kv_cache.protocol.bootstrap import EngineHello, PeerState, ToWorker, WorkerId

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
READ_BYTES = 1 << 16
# sun_path holds 108 bytes with its final zero; the folder adds "/rkv-12345678/bootstrap".
MAX_FOLDER_BYTES = 80
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class WorkerEvents(Protocol):
    """What the owner of the server is told; every message was checked to be the worker's own."""

    def worker_joined(self, hello: WorkerHello) -> Iterable[ToWorker]:
        """Return the messages for a worker that has just come."""

    def worker_offers(self, bundle: Bundle) -> None:
        """A worker offers an endpoint to a peer's worker."""

    def worker_reports(self, state: PeerState) -> None:
        """A worker's connection to a peer's worker came up or went down."""

    def worker_left(self, worker: WorkerId, reason: str) -> None:
        """A worker's connection has ended."""


class BootstrapServer:
    """Serves the workers of one engine in one incarnation.

    Only processes of the same user get in: the folder is 0700 and SO_PEERCRED must agree.
    A connection that sends anything but this protocol is closed, the others go on.
    """

    def __init__(self, me: EngineHello, events: WorkerEvents) -> None:
        self._me = me
        self._events = events
        self._writers: dict[WorkerId, asyncio.StreamWriter] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._folder: Path | None = None

    @property
    def path(self) -> str:
        """The socket's path. Raises RuntimeError before `start`."""
        if self._folder is None:
            raise RuntimeError("the bootstrap server is not started")
        return str(self._folder / "bootstrap")

    @property
    def workers(self) -> int:
        """How many workers are connected."""
        return len(self._writers)

    async def start(self) -> None:
        """Make the folder and listen."""
        base = tempfile.gettempdir()
        short = base if len(os.fsencode(base)) <= MAX_FOLDER_BYTES else "/tmp"
        self._folder = Path(tempfile.mkdtemp(prefix="rkv-", dir=short))  # mode 0700
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=READ_BYTES)

    async def close(self) -> None:
        """End all connections and remove the folder."""
        if self._server is not None:
            self._server.close()
        await cancel(self._connections)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, tp_rank: int, message: ToWorker) -> None:
        """Send to one worker; one that is not here hears it in its greeting."""
        for worker, writer in self._writers.items():
            if worker.tp_rank == tp_rank:
                writer.write(frame(encode(message)))

    def broadcast(self, messages: Iterable[ToWorker]) -> None:
        """Send to all workers that are here."""
        data = b"".join(frame(encode(message)) for message in messages)
        for writer in self._writers.values():
            writer.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        worker: WorkerId | None = None
        reason = "connection closed"
        try:
            _check_peer_user(writer)
            messages = _messages(reader)
            worker = await self._meet(messages, writer)
            async for message in messages:
                self._take(worker, message)
        except (ProtocolError, OSError) as error:
            reason = str(error)
            log.warning("%s: bootstrap connection closed: %s", self._me.engine, error)
        except asyncio.CancelledError:
            reason = "the bootstrap server closes"
        finally:
            self._connections.discard(task)
            writer.close()
            if worker is not None:
                del self._writers[worker]
                self._events.worker_left(worker, reason)

    async def _meet(
        self, messages: AsyncIterator[FromWorker], writer: asyncio.StreamWriter
    ) -> WorkerId:
        try:
            hello = await asyncio.wait_for(_first(messages), HELLO_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise ProtocolError(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
        if not isinstance(hello, WorkerHello):
            raise ProtocolError(f"no hello but {type(hello).__name__}")
        self._check_hello(hello)
        self._writers[hello.worker] = writer
        greeting = self._events.worker_joined(hello)
        writer.write(b"".join(frame(encode(message)) for message in greeting))
        return hello.worker

    def _check_hello(self, hello: WorkerHello) -> None:
        me, worker = self._me, hello.worker
        found = (worker.engine, worker.incarnation, hello.role)
        expected = (me.engine, me.incarnation, me.role)
        if found != expected:
            raise ProtocolError(f"hello of {found}, this is {expected}")
        if not 0 <= worker.tp_rank < me.tp_size:
            raise ProtocolError(f"hello of TP rank {worker.tp_rank}, TP size is {me.tp_size}")
        if worker in self._writers:
            raise ProtocolError(f"second connection of {worker}")

    def _take(self, worker: WorkerId, message: FromWorker) -> None:
        if isinstance(message, WorkerHello):
            raise ProtocolError(f"second hello of {worker}")
        sender = message.sender if isinstance(message, Bundle) else message.worker
        if sender != worker:
            raise ProtocolError(f"{worker} sent a message of {sender}")
        if isinstance(message, Bundle):
            self._events.worker_offers(message)
        else:
            self._events.worker_reports(message)


async def _first(messages: AsyncIterator[FromWorker]) -> FromWorker | None:
    async for message in messages:
        return message
    return None


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[FromWorker]:
    frames = FrameReader()
    while data := await reader.read(READ_BYTES):
        for body in frames.feed(data):
            message: FromWorker = decode(body, FromWorker)
            yield message


def _check_peer_user(writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("socket")
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.getuid():
        raise ProtocolError(f"peer has uid {uid}, this rank has {os.getuid()}")
