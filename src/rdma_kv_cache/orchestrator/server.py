# SPDX-License-Identifier: Apache-2.0
"""Rank 0 from its first to its last moment: bind, bring the engines up, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
from aiohttp import web

from rdma_kv_cache.cluster.threads import in_thread
from rdma_kv_cache.orchestrator.admission import Admission
from rdma_kv_cache.orchestrator.app import Gateway
from rdma_kv_cache.orchestrator.auth import resolve_key
from rdma_kv_cache.orchestrator.engines import Engine, Registry
from rdma_kv_cache.orchestrator.handover import Handover
from rdma_kv_cache.orchestrator.health import Monitor
from rdma_kv_cache.orchestrator.hub import Hub
from rdma_kv_cache.orchestrator.legs import open_session
from rdma_kv_cache.orchestrator.metrics import Metrics
from rdma_kv_cache.orchestrator.probe import ProbeError
from rdma_kv_cache.orchestrator.router import Router
from rdma_kv_cache.orchestrator.state import Progress
from rdma_kv_cache.protocol.codec import engine_api_key

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from rdma_kv_cache.cluster.run_dir import RunDir
    from rdma_kv_cache.config import JobConfig
    from rdma_kv_cache.protocol.bootstrap import EngineHello

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
# The engine rank has the same start timeout and knows the reason better: let it speak first.
START_MARGIN_S = 15.0
_CLEANUP_TIMEOUT_S = 1.0


class World(Protocol):
    """What the orchestrator needs of the MPI world; the methods block until all ranks are there."""

    @property
    def secret(self) -> bytes:
        """The job secret."""

    @property
    def hellos(self) -> Sequence[EngineHello]:
        """The engines' hellos, in rank order."""

    def bind_host(self) -> str:
        """Return the address that the other ranks reach."""

    def share_url(self, url: str) -> str:
        """Tell all ranks the service's URL."""

    def exchange(self, outgoing: dict[str, bytes]) -> dict[str, bytes]:
        """Take part in the exchange of the endpoints; rank 0 has none."""

    def barrier(self) -> None:
        """Return when every engine is connected and healthy."""

    def cancel(self) -> None:
        """Make a call that waits in another thread raise."""


class RunFailed(Exception):
    """The run cannot go on, with the reason for the user."""


async def run(world: World, job: JobConfig, run_dir: RunDir) -> int:
    """Serve until SIGTERM (or SIGINT) or until the run fails; return the exit code."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with open_session(engine_api_key(world.secret)) as session:
            return await Server(world, job, run_dir, session).run(stop)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class Server:
    """The parts of the orchestrator, put together."""

    def __init__(
        self, world: World, job: JobConfig, run_dir: RunDir, session: aiohttp.ClientSession
    ) -> None:
        api_key = resolve_key(job.orchestrator.api_key)
        self._world = world
        self._settings = job.orchestrator
        self._registry = Registry(world.hellos)
        self._hub = Hub(self._registry, world.secret)
        self._progress = Progress(run_dir, self._registry, api_key)
        self._admission = Admission(job.orchestrator.max_inflight)
        self._monitor = Monitor(self._registry, self._hub, session, job)
        self._handover = Handover(run_dir, session, job.orchestrator.request_timeout_s)
        metrics = Metrics(self._admission, self._registry)
        router = Router(self._registry, session, metrics, job.orchestrator)
        self._gateway = Gateway(
            self._registry,
            self._hub,
            router,
            self._admission,
            metrics,
            session,
            self._progress,
            api_key,
            self._handover,
        )
        self._changed = asyncio.Event()
        self._registry.listeners.append(lambda _engine: self._changed.set())

    async def run(self, stop: asyncio.Event) -> int:
        """Run until `stop` is set or the run fails; return the exit code."""
        runner = web.AppRunner(
            self._gateway.build_app(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_CLEANUP_TIMEOUT_S,
        )
        monitor: asyncio.Task[None] | None = None
        handover: asyncio.Task[None] | None = None
        try:
            await self._bind(runner)
            monitor = asyncio.ensure_future(self._monitor.run())
            handover = asyncio.ensure_future(self._handover.watch())
            await _until(stop, self._bring_up_and_watch(), monitor)
            await self._drain()
            await _cancel(monitor)
            await self._hub.stop_all("the job ends", STOP_TIMEOUT_S)
            self._progress.enter("DONE", "stopped")
        except Exception as error:
            # A RunFailed's text is whole; anything else is a defect of ours and shows where.
            log.error("%s", error, exc_info=not isinstance(error, RunFailed))  # noqa: TRY400
            self._admission.draining = True
            self._progress.enter("FAILED", self._progress.stage, str(error) or repr(error))
            await self._hub.stop_all(f"the run failed: {error}", STOP_TIMEOUT_S)
            return 1
        else:
            return 0
        finally:
            self._world.cancel()
            for task in (monitor, handover):
                if task is not None:
                    await _cancel(task)
            await runner.cleanup()

    async def _bind(self, runner: web.AppRunner) -> None:
        """Bind first and publish the address that came of it."""
        await runner.setup()
        host = self._settings.host
        if host == "auto":
            host = self._world.bind_host()
        port = 0 if self._settings.port == "auto" else self._settings.port
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise RunFailed(
                f"bind {host}:{port}: {error.strerror or error}; choose another "
                "orchestrator.port (auto takes a free one) or orchestrator.host"
            ) from error
        public = socket.gethostname() if host in ("0.0.0.0", "::") else host
        self._progress.url = f"http://{_bracket(public)}:{runner.addresses[0][1]}"
        self._progress.enter("STARTING", "the engines start vLLM")
        log.info("orchestrator at %s", self._progress.url)

    async def _bring_up_and_watch(self) -> None:
        limit = self._settings.engine_start_timeout_s + START_MARGIN_S
        bring_up = asyncio.ensure_future(self._bring_up())
        early_end = asyncio.ensure_future(self._engine_given_up())
        try:
            done, _ = await asyncio.wait(
                {bring_up, early_end}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise RunFailed(f"not ready after {limit:g} s: {self._describe_engines()}")
            for task in done:
                task.result()
        finally:
            await _cancel(bring_up)
            await _cancel(early_end)
        await self._decodes_gone()

    async def _bring_up(self) -> None:
        try:
            await in_thread(lambda: self._world.share_url(self._progress.url))
            await in_thread(lambda: self._world.exchange({}))
            self._progress.enter("STARTING", "the engines connect")
            await in_thread(self._world.barrier)
            self._progress.enter("STARTING", "a probe goes through every pair")
            while not all(engine.ready for engine in self._registry.engines.values()):
                self._changed.clear()
                await self._changed.wait()
            await self._monitor.prove_pairs()
        except (ProbeError, RuntimeError, ValueError) as error:  # MPI errors are RuntimeErrors
            raise RunFailed(f"{self._progress.stage}: {error}") from error
        self._progress.enter("READY", "serving")

    async def _engine_given_up(self) -> None:
        """Raise RunFailed as soon as an engine is gone while the run starts."""
        while True:
            for engine in self._registry.engines.values():
                if engine.state in ("LOST", "STOPPED"):
                    raise RunFailed(f"{engine.name} did not start: {_state_of(engine)}")
            await asyncio.sleep(self._settings.heartbeat_s / 2)

    async def _decodes_gone(self) -> None:
        """Raise RunFailed when no decode engine has been alive for `health_timeout_s`."""
        last_alive = time.monotonic()
        while True:
            decodes = self._registry.of_role("decode")
            if any(engine.state not in ("LOST", "STOPPED") for engine in decodes):
                last_alive = time.monotonic()
            elif time.monotonic() - last_alive > self._settings.health_timeout_s:
                states = "; ".join(f"{engine.name} {_state_of(engine)}" for engine in decodes)
                raise RunFailed(f"no decode engine is left: {states}")
            await asyncio.sleep(self._settings.heartbeat_s)

    async def _drain(self) -> None:
        self._progress.enter("DRAINING", f"{self._admission.inflight} requests are in flight")
        if not await self._admission.drain(DRAIN_TIMEOUT_S):
            log.warning(
                "%d requests did not end within %g s and are cut off",
                self._admission.inflight,
                DRAIN_TIMEOUT_S,
            )

    def _describe_engines(self) -> str:
        engines = self._registry.engines.values()
        return ", ".join(f"{engine.name} {_state_of(engine)}" for engine in engines)


def _state_of(engine: Engine) -> str:
    return engine.state + (f" ({engine.reason})" if engine.reason else "")


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _until(
    stop: asyncio.Event, work: Coroutine[Any, Any, None], monitor: asyncio.Task[None]
) -> None:
    """Run `work` beside `monitor` until `stop` is set; raise what either of them raises."""
    stopped = asyncio.ensure_future(stop.wait())
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({stopped, task, monitor}, return_when=asyncio.FIRST_COMPLETED)
        for ended in done - {stopped}:
            ended.result()
    finally:
        await _cancel(stopped)
        await _cancel(task)


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel `task` and wait for its end; what it raised has been dealt with."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
