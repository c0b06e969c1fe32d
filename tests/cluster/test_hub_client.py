# SPDX-License-Identifier: Apache-2.0
"""The control connection between an engine rank and the orchestrator's real hub."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from aiohttp import web

from rdma_kv_cache.cluster import hub_client
from rdma_kv_cache.cluster.hub_client import CONTROL_PATH, HubClient
from rdma_kv_cache.orchestrator.engines import Registry
from rdma_kv_cache.orchestrator.hub import Hub
from rdma_kv_cache.protocol.bootstrap import Bundle, Bundles, EngineHello, PeerDown, WorkerId
from rdma_kv_cache.protocol.control import Announce, EngineState, Heartbeat, Relay, Stop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SECRET = b"k" * 32
PREFILL = EngineHello("prefill-0", "prefill", "host", 1, 1)
DECODE = EngineHello("decode-0", "decode", "host", 2, 1)
HEARTBEAT_S = 0.05


class Engine:
    """What a rank would say of its engine, and what it was told."""

    def __init__(self, hello: EngineHello) -> None:
        self.hello = hello
        self.url = f"http://{hello.engine}"
        self.state: EngineState = "STARTING"
        self.heard: list[Any] = []

    def identity(self) -> tuple[EngineHello, str]:
        return self.hello, self.url

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(self.hello.engine, self.hello.incarnation, self.state, 0, 1, 1, pid=9)

    def client(self, url: str, secret: bytes = SECRET) -> HubClient:
        return HubClient(url, secret, self, self.heard.append, HEARTBEAT_S)


class Orchestrator:
    """The real hub behind a real HTTP server; can be started again on the same port."""

    def __init__(self) -> None:
        self.registry = Registry([PREFILL, DECODE])
        self.hub = Hub(self.registry, SECRET)
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def state(self, name: str) -> str:
        return self.registry.engines[name].state

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get(CONTROL_PATH, self.hub.handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()


@asynccontextmanager
async def orchestrator() -> AsyncIterator[Orchestrator]:
    peer = Orchestrator()
    await peer.start()
    try:
        yield peer
    finally:
        await peer.stop()


async def settle(condition: Callable[[], Any], timeout_s: float = 5) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            pytest.fail("did not settle")
        await asyncio.sleep(0.01)


def test_engines_attach_beat_and_hear_each_other() -> None:
    bundles = Bundles([Bundle(WorkerId("prefill-0", 0, 3), WorkerId("decode-0", 0, 2), b"x")])

    async def main() -> None:
        prefill, decode = Engine(PREFILL), Engine(DECODE)
        async with (
            orchestrator() as peer,
            prefill.client(peer.url) as client,
            decode.client(peer.url) as other,
        ):
            prefill.state = decode.state = "READY"
            client.beat()
            other.beat()
            await settle(lambda: len(peer.registry.connected_pairs()) == 1)
            assert peer.registry.engines["decode-0"].url == "http://decode-0"
            assert client.away_for() == 0

            prefill.state = "RESTARTING"
            client.beat()
            await settle(lambda: decode.heard)
            prefill.hello = msgspec.structs.replace(PREFILL, incarnation=3)
            prefill.state = "STARTING"
            client.send(Announce(*prefill.identity()))
            client.send(Relay("decode-0", bundles))
            await settle(lambda: len(decode.heard) == 3)
            down, announced, relay = decode.heard
            assert (down.engine, down.incarnation) == ("prefill-0", 1)
            assert isinstance(down, PeerDown)
            assert announced == Announce(prefill.hello, prefill.url)
            assert relay == Relay("decode-0", bundles)

            stopping = asyncio.create_task(peer.hub.stop_all("the end", 5))
            await settle(lambda: decode.heard[3:] == [Stop("the end")] == prefill.heard)
            stopping.cancel()

    asyncio.run(main())


def test_the_last_state_arrives_before_the_end() -> None:
    async def main() -> None:
        engine = Engine(PREFILL)
        async with orchestrator() as peer:
            async with engine.client(peer.url) as client:
                await settle(lambda: client.away_for() == 0)
                engine.state = "STOPPED"
                await client.flush(5)
            assert peer.state("prefill-0") == "STOPPED"

    asyncio.run(main())


def test_the_client_comes_back_with_its_present_identity_and_what_it_kept() -> None:
    bundles = Bundles([Bundle(WorkerId("prefill-0", 0, 8), WorkerId("decode-0", 0, 2), b"kept")])

    async def main() -> None:
        prefill, decode = Engine(PREFILL), Engine(DECODE)
        async with (
            orchestrator() as peer,
            prefill.client(peer.url) as client,
            decode.client(peer.url) as other,
        ):
            await settle(lambda: client.away_for() == 0 and other.away_for() == 0)
            await peer.stop()
            await settle(lambda: client.away_for() > 0.05)
            # An announcement that is overtaken by a newer life must not arrive after it.
            prefill.hello = msgspec.structs.replace(PREFILL, incarnation=7)
            client.send(Announce(*prefill.identity()))
            prefill.hello = msgspec.structs.replace(PREFILL, incarnation=8)
            client.send(Relay("decode-0", bundles))
            await peer.start()
            await settle(lambda: len(decode.heard) == 2)
            assert decode.heard == [
                Announce(prefill.hello, prefill.url),
                Relay("decode-0", bundles),
            ]
            assert peer.registry.engines["prefill-0"].incarnation == 8
            assert client.away_for() == 0

    asyncio.run(main())


def test_a_wrong_secret_opens_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = Engine(PREFILL)
        engine.state = "READY"
        async with orchestrator() as peer, engine.client(peer.url, b"w" * 32) as client:
            await settle(lambda: "wrong signature" in caplog.text)
            await asyncio.sleep(0.2)
            assert peer.state("prefill-0") == "STARTING"
            assert client.away_for() > 0

    asyncio.run(main())


def test_pauses_between_attempts_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(hub_client, "MAX_BACKOFF_S", 0.1)

    async def main() -> int:
        attempts = 0

        async def refuse(_reader: Any, writer: asyncio.StreamWriter) -> None:
            nonlocal attempts
            attempts += 1
            writer.close()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Engine(PREFILL).client(f"http://127.0.0.1:{port}"):
            await asyncio.sleep(0.6)
        return attempts

    # Pauses of 10, 20, 40, 80, then 100 ms make 8 attempts, of which aiohttp makes 16 connections;
    # without growth there would be about 60 attempts.
    assert 4 <= asyncio.run(main()) <= 24
