# SPDX-License-Identifier: Apache-2.0
"""A whole orchestrator in this process, with real HTTP servers and websockets as its peers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web

from rdma_kv_cache.cluster.run_dir import RunDir, RunState
from rdma_kv_cache.config import JobConfig, OrchestratorConfig
from rdma_kv_cache.orchestrator.legs import open_session
from rdma_kv_cache.orchestrator.server import Server
from rdma_kv_cache.protocol.bootstrap import EngineHello, PathInfo
from rdma_kv_cache.protocol.codec import engine_api_key, sign, verify
from rdma_kv_cache.protocol.control import (
    Announce,
    Attach,
    Challenge,
    FromHub,
    Heartbeat,
    Restart,
    Stop,
)

if TYPE_CHECKING:
    from pathlib import Path

SECRET = b"s" * 32
HEARTBEAT_S = 0.05
WAIT_S = 10.0
MODEL = {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
METRICS = """\
# HELP vllm:rdma_kv_bytes_total Bytes.
# TYPE vllm:rdma_kv_bytes_total counter
vllm:rdma_kv_bytes_total{engine="0",model_name="tiny"} 4096.0
# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 2.0
# HELP vllm:prompt_tokens_total Not selected.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 9.0
"""
Behaviour = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until `condition()` is true, for WAIT_S at most."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        await asyncio.sleep(0.005)


def params_of(body: dict[str, Any]) -> dict[str, Any]:
    return body.get("kv_transfer_params") or {}


class Vllm:
    """The HTTP side of one engine, scripted by `behave`; records every request."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.behave: Behaviour = self.complete
        self.requests: list[tuple[str, dict[str, Any], Mapping[str, str]]] = []
        self.cancelled = 0
        self.open = 0
        self.healthy = True
        self.url = ""
        self._runner: web.AppRunner | None = None

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Bodies of the requests that are not the orchestrator's own probes."""
        return [body for _, body, _ in self.requests if "is this engine" not in str(body)]

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/{route:.*}", self._post)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Close the port and every connection, as a killed process does."""
        if self._runner is not None:
            self.abort_connections()
            await self._runner.cleanup()
            self._runner = None

    def abort_connections(self) -> None:
        """Close every connection; the port stays open."""
        assert self._runner is not None
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def complete(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("stream"):
            return await self.stream(request, [f"{self.name} says", " hi"])
        return web.json_response({"served_by": self.name, "id": request.headers["X-Request-Id"]})

    async def stream(
        self, request: web.Request, texts: list[str], gate: asyncio.Event | None = None
    ) -> web.StreamResponse:
        """Stream `texts`; after the first one wait for `gate`."""
        response = await self.start_stream(request)
        for number, text in enumerate(texts):
            if number and gate is not None:
                await gate.wait()
            await response.write(f"data: {json.dumps({'text': text})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def start_stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        return response

    async def hang(self, _request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append((request.path, body, request.headers))
        self.open += 1
        try:
            return await self.behave(request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response(MODEL)

    async def _health(self, _request: web.Request) -> web.Response:
        if not self.healthy:
            await asyncio.sleep(3600)
        return web.Response()

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(text=METRICS)


class Rank:
    """An engine rank's end of the control connection."""

    def __init__(self, hello: EngineHello, vllm: Vllm, peers: int) -> None:
        self.hello = hello
        self.vllm = vllm
        self.peers_connected = peers
        self.peers_expected = peers
        self.state = "READY"
        self.reason = ""
        self.restarts = 0
        self.paths: dict[str, PathInfo] = {}
        self.beating = True
        self.answers_stop = True
        self.received: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._session: aiohttp.ClientSession | None = None

    async def attach(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url + "/internal/control")
        challenge: Challenge = verify(
            await self._socket.receive_bytes(timeout=WAIT_S), SECRET, Challenge
        )
        await self.send(Attach(self.hello, challenge.nonce, self.vllm.url))
        self._tasks = [asyncio.ensure_future(self._beat()), asyncio.ensure_future(self._receive())]

    async def send(self, message: Any) -> None:
        await self.send_raw(sign(message, SECRET))

    async def announce(self, incarnation: int) -> None:
        """Come back as a restarted vLLM does."""
        old = self.hello
        self.hello = EngineHello(old.engine, old.role, old.host, incarnation, old.tp_size)
        self.restarts += 1
        self.state = "READY"
        await self.send(Announce(self.hello, self.vllm.url))

    @property
    def close_code(self) -> int | None:
        """Why the hub closed the connection; None while it is open."""
        assert self._socket is not None
        return self._socket.close_code if self._socket.closed else None

    async def send_raw(self, frame: bytes) -> None:
        assert self._socket is not None
        await self._socket.send_bytes(frame)

    def got(self, kind: type) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._session is not None:
            await self._session.close()

    async def _beat(self) -> None:
        while True:
            if self.beating:
                beat = Heartbeat(
                    self.hello.engine,
                    self.hello.incarnation,
                    self.state,  # type: ignore[arg-type]
                    self.restarts,
                    self.peers_connected,
                    self.peers_expected,
                    self.reason,
                    paths=self.paths,
                )
                await self.send(beat)
            await asyncio.sleep(HEARTBEAT_S)

    async def _receive(self) -> None:
        assert self._socket is not None
        async for frame in self._socket:
            message: Any = verify(frame.data, SECRET, FromHub)
            self.received.append(message)
            if isinstance(message, Restart):
                self.state = "RESTARTING"
            if isinstance(message, Stop) and self.answers_stop:
                self._tasks[0].cancel()
                await self._socket.close()


class World:
    """The MPI world, as rank 0 sees it."""

    def __init__(self, hellos: list[EngineHello]) -> None:
        self.secret = SECRET
        self.hellos = hellos
        self.url = ""
        self.passed = threading.Event()
        self.cancelled = False

    def bind_host(self) -> str:
        return "127.0.0.1"

    def share_url(self, url: str) -> str:
        self.url = url
        return url

    def exchange(self, outgoing: dict[str, bytes]) -> dict[str, bytes]:
        assert outgoing == {}
        return {}

    def barrier(self) -> None:
        assert self.passed.wait(WAIT_S)
        if self.cancelled:
            raise RuntimeError("MPI barrier: given up")

    def cancel(self) -> None:
        self.cancelled = True
        self.passed.set()


class Folder(RunDir):
    """The run folder, which also remembers every state that was written."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.create()
        self.states: list[RunState] = []

    @property
    def state(self) -> RunState:
        return self.read_state() or RunState("STARTING")

    def write_state(self, state: RunState) -> None:
        self.states.append(state)
        super().write_state(state)


class Rig:
    """Orchestrator, engines and ranks of one job."""

    def __init__(self, root: Path, prefills: int, decodes: int, settings: dict[str, Any]) -> None:
        settings = {"heartbeat_s": HEARTBEAT_S, "health_timeout_s": 0.6, **settings}
        self.job = JobConfig.model_validate(
            {
                "model": {"name": "tiny"},
                "rdma": {"connect_timeout_s": 0.2},
                "prefill": {"engines": prefills},
                "decode": {"engines": decodes},
                "orchestrator": OrchestratorConfig(**settings),
            }
        )
        names = self.job.engine_names("prefill") + self.job.engine_names("decode")
        hellos = [
            EngineHello(name, name.split("-")[0], "localhost", 100 + number, 1)
            for number, name in enumerate(names)
        ]
        self.vllms = {name: Vllm(name) for name in names}
        peers = {"prefill": decodes, "decode": prefills}
        self.ranks = {
            hello.engine: Rank(hello, self.vllms[hello.engine], peers[hello.role])
            for hello in hellos
        }
        self.world = World(hellos)
        self.folder = Folder(root)
        self.stop = asyncio.Event()
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.client: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return self.world.url

    async def serve(self) -> int:
        async with open_session(engine_api_key(SECRET)) as session:
            return await Server(self.world, self.job, self.folder, session).run(self.stop)

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
        """Post `body` and return (status, JSON)."""
        body = {"model": "tiny", "prompt": "hello there", **body}
        async with self.client.post(self.url + path, json=body) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(self.url + path) as response:
            return response.status, await response.json()

    def calls(self, name: str) -> list[dict[str, Any]]:
        return self.vllms[name].bodies

    def engine_state(self, name: str) -> str:
        return next(e.state for e in self.folder.state.engines if e.name == name)


@contextlib.asynccontextmanager
async def rig(
    root: Path, prefills: int = 1, decodes: int = 1, *, ready: bool = True, **settings: Any
) -> AsyncIterator[Rig]:
    """Run a job; with `ready`, until it serves. `settings` are the orchestrator's."""
    made = Rig(root, prefills, decodes, settings)
    server: asyncio.Task[int] | None = None
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as client:
        made.client = client
        try:
            for vllm in made.vllms.values():
                await vllm.start()
            server = asyncio.ensure_future(made.serve())
            server.add_done_callback(lambda task: _hand_over(task, made.exit_code))
            await until(lambda: made.url, "the orchestrator's url")
            if ready:
                for rank in made.ranks.values():
                    await rank.attach(made.url)
                made.world.passed.set()
                await until(lambda: made.folder.state.state == "READY", "READY")
                if (key := made.folder.read_api_key()) is not None:
                    client.headers["Authorization"] = f"Bearer {key}"
            yield made
        finally:
            made.stop.set()
            for vllm in made.vllms.values():
                await vllm.stop()
            if server is not None:
                await asyncio.wait({server}, timeout=WAIT_S)
            for rank in made.ranks.values():
                await rank.close()


def _hand_over(task: asyncio.Task[int], exit_code: asyncio.Future[int]) -> None:
    if task.cancelled():
        exit_code.cancel()
    elif (error := task.exception()) is not None:
        exit_code.set_exception(error)
    else:
        exit_code.set_result(task.result())
