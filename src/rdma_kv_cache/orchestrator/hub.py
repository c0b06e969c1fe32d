# SPDX-License-Identifier: Apache-2.0
"""The control connection of the engine ranks: one websocket each, every frame signed.

A connection starts with the hub's Challenge; only an Attach that repeats its nonce and carries
the job's signature opens it, so neither strangers nor recorded frames get in.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from typing import TYPE_CHECKING, Any

from aiohttp import WSCloseCode, WSMsgType, web

from rdma_kv_cache.protocol.bootstrap import PeerDown
from rdma_kv_cache.protocol.codec import MAX_FRAME_BYTES, ProtocolError, sign, verify
from rdma_kv_cache.protocol.control import (
    Announce,
    Attach,
    Challenge,
    Heartbeat,
    Relay,
    Restart,
    Stop,
    ToHub,
)

if TYPE_CHECKING:
    from rdma_kv_cache.orchestrator.engines import Engine, Registry

log = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 10.0
# Messages that wait for an engine rank that is not attached: bundles and announcements of all
# peers many times over. What does not fit means that the rank is gone.
OUTBOX_MESSAGES = 1024
CLOSE_TIMEOUT_S = 1.0
_WS_REASON_BYTES = 120  # RFC 6455: a control frame carries 125 bytes, 2 of them the code


class Hub:
    """Feeds the registry from the ranks' frames and carries messages between the ranks."""

    def __init__(self, registry: Registry, secret: bytes) -> None:
        self._registry = registry
        self._secret = secret
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._outboxes: dict[str, asyncio.Queue[Any]] = {
            name: asyncio.Queue(OUTBOX_MESSAGES) for name in registry.engines
        }
        self._down: set[tuple[str, int]] = set()
        self._changed = asyncio.Event()
        registry.listeners.append(self._tell_peers_down)

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        """Serve one engine rank until its connection ends."""
        socket = web.WebSocketResponse(max_msg_size=MAX_FRAME_BYTES, timeout=CLOSE_TIMEOUT_S)
        await socket.prepare(request)
        engine: Engine | None = None
        writer: asyncio.Task[None] | None = None
        try:
            engine = await self._attach(socket)
            previous = self._sockets.get(engine.name)
            self._sockets[engine.name] = socket
            if previous is not None:
                await previous.close(message=b"another connection of this engine took over")
            writer = asyncio.ensure_future(self._write(engine, socket))
            await self._read(engine, socket)
        except ProtocolError as error:
            log.warning("control connection from %s refused: %s", request.remote, error)
            reason = str(error).encode()[:_WS_REASON_BYTES]
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=reason)
        finally:
            if writer is not None:
                writer.cancel()
            if engine is not None and self._sockets.get(engine.name) is socket:
                del self._sockets[engine.name]
                log.info("%s: control connection closed", engine.name)
                self._changed.set()
        return socket

    def restart(self, engine: Engine, reason: str) -> None:
        """Take the engine out of service and have its rank start vLLM again."""
        if engine.name not in self._sockets:
            self._registry.lose(engine, f"{reason}; its rank is not attached")
            return
        log.warning("%s: restart: %s", engine.name, reason)
        self._registry.condemn(engine, reason)
        self._send(engine.name, Restart(reason))

    async def stop_all(self, reason: str, timeout_s: float) -> list[str]:
        """Tell every rank to stop; return the engines still attached after `timeout_s`."""
        for name in self._sockets:
            self._send(name, Stop(reason))
        try:
            await asyncio.wait_for(self._all_detached(), timeout_s)
        except asyncio.TimeoutError:
            log.warning("still attached after %g s: %s", timeout_s, sorted(self._sockets))
        return sorted(self._sockets)

    async def _all_detached(self) -> None:
        while self._sockets:
            self._changed.clear()
            await self._changed.wait()

    async def _attach(self, socket: web.WebSocketResponse) -> Engine:
        nonce = secrets.token_bytes(32)
        await socket.send_bytes(sign(Challenge(nonce), self._secret))
        try:
            message = await asyncio.wait_for(socket.receive(), ATTACH_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise ProtocolError(f"no attach within {ATTACH_TIMEOUT_S:g} s") from None
        if message.type is not WSMsgType.BINARY:
            raise ProtocolError(f"no attach: got {message.type.name}")
        attach: Attach = verify(message.data, self._secret, Attach)
        if not hmac.compare_digest(attach.nonce, nonce):
            raise ProtocolError("attach answers another challenge (replayed?)")
        engine = self._registry.engines.get(attach.hello.engine)
        if engine is None or engine.role != attach.hello.role:
            raise ProtocolError(
                f"unknown engine {attach.hello.engine!r} ({attach.hello.role!r}); this job has "
                + ", ".join(self._registry.engines)
            )
        self._take_identity(engine, Announce(attach.hello, attach.url))
        if engine.incarnation == engine.condemned:
            # Whether its Restart reached it is unknown; its first heartbeat will tell.
            self._registry.lose(engine, engine.reason)
        log.info("%s attached from %s at %s", engine.name, attach.hello.host, attach.url)
        return engine

    async def _read(self, engine: Engine, socket: web.WebSocketResponse) -> None:
        async for frame in socket:
            if frame.type is not WSMsgType.BINARY:
                raise ProtocolError(f"{engine.name} sent {frame.type.name}, expected BINARY")
            message: Any = verify(frame.data, self._secret, ToHub)
            self._dispatch(engine, message)

    def _dispatch(self, engine: Engine, message: Any) -> None:
        if isinstance(message, Relay):
            if message.engine not in self._outboxes:
                raise ProtocolError(f"{engine.name} relays to unknown engine {message.engine!r}")
            self._send(message.engine, message)
            return
        if isinstance(message, Attach):
            raise ProtocolError(f"{engine.name} attached twice on one connection")
        sender = message.engine if isinstance(message, Heartbeat) else message.hello.engine
        if sender != engine.name:
            raise ProtocolError(f"{engine.name} sent a message of {sender!r}")
        if isinstance(message, Heartbeat):
            self._registry.heartbeat(engine, message)
            self._revive(engine, message)
        else:
            self._take_identity(engine, message)

    def _revive(self, engine: Engine, message: Heartbeat) -> None:
        """Restart a lost engine that is heard again: its peers closed their endpoints to it."""
        is_condemned = engine.incarnation == message.incarnation == engine.condemned
        if is_condemned and engine.state == "LOST" and message.state == "READY":
            self.restart(engine, f"back after it was lost: {engine.reason}")

    def _take_identity(self, engine: Engine, message: Announce) -> None:
        """Note who the engine is now, and tell the other role when it is a new incarnation."""
        is_new = message.hello.incarnation != engine.incarnation
        self._registry.attached(engine, message.hello, message.url)
        if is_new:
            self._send_peers(engine, message)

    def _tell_peers_down(self, engine: Engine) -> None:
        incarnation = (engine.name, engine.incarnation)
        is_down = engine.state in ("RESTARTING", "LOST", "STOPPED")
        if is_down and incarnation not in self._down:
            self._down.add(incarnation)
            self._send_peers(engine, PeerDown(*incarnation, engine.reason))

    def _send_peers(self, engine: Engine, message: Announce | PeerDown) -> None:
        for other in self._registry.engines.values():
            if other.role != engine.role:
                self._send(other.name, message)

    def _send(self, name: str, message: Any) -> None:
        try:
            self._outboxes[name].put_nowait(message)
        except asyncio.QueueFull:
            log.warning("%s: dropped %s, its outbox is full", name, type(message).__name__)

    async def _write(self, engine: Engine, socket: web.WebSocketResponse) -> None:
        outbox = self._outboxes[engine.name]
        while True:
            message = await outbox.get()
            try:
                await socket.send_bytes(sign(message, self._secret))
            except ConnectionError as error:
                log.warning("%s: lost a %s: %s", engine.name, type(message).__name__, error)
                return
