# SPDX-License-Identifier: Apache-2.0
"""An engine rank's websocket to the orchestrator's hub. Every frame is signed, both ways."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

import aiohttp

from rdma_kv_cache.cluster.tasks import cancel
from rdma_kv_cache.protocol.codec import MAX_FRAME_BYTES, ProtocolError, sign, verify
from rdma_kv_cache.protocol.control import Announce, Attach, Challenge, FromHub, Relay

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from rdma_kv_cache.protocol.bootstrap import EngineHello
    from rdma_kv_cache.protocol.control import Heartbeat

log = logging.getLogger(__name__)

CONTROL_PATH = "/internal/control"
ATTACH_TIMEOUT_S = 10.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
# A host that vanished sends no FIN; an unanswered websocket ping ends the connection.
PING_S = 10.0
# Relays kept while the hub is away; the bundles of every peer fit many times.
MAX_KEPT = 1024


class EngineView(Protocol):
    """Says at any time who the engine is and how it is."""

    def identity(self) -> tuple[EngineHello, str]:
        """Return the engine's present hello and its server's URL ("" before there is one)."""

    def heartbeat(self) -> Heartbeat:
        """Return the engine's present state."""


class HubClient:
    """Keeps the connection: attaches, beats, reconnects with a growing pause.

    Use as an async context manager. Messages of the hub go to `on_message`, one at a time.
    """

    def __init__(
        self,
        url: str,
        secret: bytes,
        engine: EngineView,
        on_message: Callable[[FromHub], None],
        heartbeat_s: float,
    ) -> None:
        self._url = url.rstrip("/") + CONTROL_PATH
        self._secret = secret
        self._engine = engine
        self._on_message = on_message
        self._heartbeat_s = heartbeat_s
        self._outbox: deque[Announce | Relay] = deque(maxlen=MAX_KEPT)
        self._wake = asyncio.Event()
        self._sent = asyncio.Event()
        self._is_attached = False
        self._away_since = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HubClient:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await cancel([self._task])

    def send(self, message: Announce | Relay) -> None:
        """Send now, or as soon as the hub is back."""
        self._outbox.append(message)
        self._wake.set()

    def beat(self) -> None:
        """Send a heartbeat now: the state has changed."""
        self._wake.set()

    async def flush(self, timeout_s: float) -> None:
        """Send the present state and all that waits; give up after `timeout_s`."""
        self._sent.clear()
        self._wake.set()
        try:
            await asyncio.wait_for(self._sent.wait(), timeout_s)
        except asyncio.TimeoutError:
            log.warning("the orchestrator did not take the last state within %g s", timeout_s)

    def away_for(self) -> float:
        """Return the seconds since the hub was attached; 0 while it is."""
        return 0.0 if self._is_attached else time.monotonic() - self._away_since

    async def _run(self) -> None:
        backoff = FIRST_BACKOFF_S
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ATTACH_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                try:
                    await self._connect(session)
                except (aiohttp.ClientError, OSError, ProtocolError, asyncio.TimeoutError) as error:
                    log.warning(
                        "control connection to %s: %s: %s", self._url, type(error).__name__, error
                    )
                if self._is_attached:
                    backoff = FIRST_BACKOFF_S
                    self._is_attached, self._away_since = False, time.monotonic()
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_S)

    async def _connect(self, session: aiohttp.ClientSession) -> None:
        """Be connected until the hub or the network ends it."""
        async with session.ws_connect(
            self._url, max_msg_size=MAX_FRAME_BYTES, heartbeat=PING_S
        ) as socket:
            await asyncio.wait_for(self._attach(socket), ATTACH_TIMEOUT_S)
            writer = asyncio.create_task(self._write(socket))
            try:
                await self._read(socket)
            finally:
                await cancel([writer])

    async def _attach(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        frame = await socket.receive()
        if frame.type is not aiohttp.WSMsgType.BINARY:
            raise ProtocolError(f"the hub sent {frame.type.name}, expected its challenge")
        challenge: Challenge = verify(frame.data, self._secret, Challenge)
        # The Attach says who the engine is now; what was to be announced before is older.
        relays = [message for message in self._outbox if isinstance(message, Relay)]
        self._outbox.clear()
        self._outbox.extend(relays)
        hello, url = self._engine.identity()
        await self._send(socket, Attach(hello, challenge.nonce, url))
        self._is_attached = True

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for frame in socket:
            if frame.type is not aiohttp.WSMsgType.BINARY:
                raise ProtocolError(f"the hub sent {frame.type.name}, expected BINARY")
            message: FromHub = verify(frame.data, self._secret, FromHub)
            self._on_message(message)
        log.info("control connection closed by the orchestrator: code %s", socket.close_code)

    async def _write(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            self._wake.clear()
            while self._outbox:
                await self._send(socket, self._outbox[0])
                self._outbox.popleft()
            await self._send(socket, self._engine.heartbeat())
            if not self._wake.is_set():
                self._sent.set()
            try:
                await asyncio.wait_for(self._wake.wait(), self._heartbeat_s)
            except asyncio.TimeoutError:
                continue

    async def _send(self, socket: aiohttp.ClientWebSocketResponse, message: msgspec.Struct) -> None:
        await socket.send_bytes(sign(message, self._secret))
