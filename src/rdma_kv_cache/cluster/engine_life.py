# SPDX-License-Identifier: Apache-2.0
"""One life of an engine: one incarnation, one vLLM server, the links of its workers."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Protocol

import aiohttp

from rdma_kv_cache.cluster.bootstrap_server import BootstrapServer
from rdma_kv_cache.cluster.links import Links
from rdma_kv_cache.cluster.vllm_process import (
    EngineSpec,
    VllmProcess,
    free_port,
    is_port_taken,
    vllm_command,
    vllm_environment,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from rdma_kv_cache.config import JobConfig, Role
    from rdma_kv_cache.protocol.bootstrap import (
        Bundle,
        EngineHello,
        PeerState,
        ToWorker,
        WorkerHello,
        WorkerId,
    )

log = logging.getLogger(__name__)

POLL_S = 0.25
HEALTH_TIMEOUT_S = 2.0
# A pair that failed tries again with pauses of up to 15 s; one that stays down this many
# connect timeouts (incompatible engines, no route) will not come up by waiting.
PAIR_PATIENCE = 3
# A line a port in the backend's description: "mlx5_0:1 (InfiniBand, ...): why"; where several
# backends are described the first line begins with "verbs: ".
_NIC = re.compile(r"^(?:verbs: )?([\w-]+:\d+) \(", re.MULTILINE)


class EngineFailed(Exception):
    """An engine did not start or cannot go on, with the reason for the user."""


class LifeEvents(Protocol):
    """What the owner of a life is told."""

    def url_chosen(self) -> None:
        """The server starts now and will answer at `EngineLife.url`."""

    def bundle_offered(self, bundle: Bundle) -> None:
        """A worker offers an endpoint, to be carried to the peer's rank."""

    def links_changed(self) -> None:
        """A pair of workers came up or went down."""


class EngineLife:
    """From the start of a vLLM server to the end of all its processes."""

    def __init__(
        self,
        hello: EngineHello,
        peers: Iterable[EngineHello],
        job: JobConfig,
        bind_host: str,
        api_key: str,
        log_file: Path,
        events: LifeEvents,
        gpus: Sequence[str] = (),
    ) -> None:
        self.hello = hello
        self.links = Links(hello, peers)
        self.url = ""
        self.transport = ""
        """The engine's backend, once a worker has told; so are `nics`, its RDMA ports."""
        self.nics: list[str] = []
        self._job = job
        self._bind_host = bind_host
        self._api_key = api_key
        self._log_file = log_file
        self._events = events
        self._gpus = gpus
        self._server = BootstrapServer(hello, self)
        self._process: VllmProcess | None = None
        self._port = 0
        self._has_retried = False
        self._changed = asyncio.Event()
        self._deadline = time.monotonic() + job.orchestrator.engine_start_timeout_s

    @property
    def pid(self) -> int:
        """The pid of the vLLM server; 0 while none runs."""
        return self._process.pid if self._process is not None and self._process.is_running else 0

    @property
    def outcome(self) -> str:
        """How vLLM ended, in words."""
        return "was not started" if self._process is None else self._process.outcome

    async def start(self) -> None:
        """Open the bootstrap socket and start vLLM."""
        await self._server.start()
        await self._spawn()

    async def wait_offers(self) -> None:
        """Wait until every worker has offered an endpoint to every peer's worker.

        Like the waits below it raises EngineFailed when vLLM ends or the start's time is up.
        """
        await self._until(self.links.has_all_offers, "waiting for the workers' endpoints")

    async def wait_ready(self) -> None:
        """Wait until vLLM is healthy and every pair has verified its probe write."""
        await self._until(self.links.is_complete, "connecting to the peers")
        async with aiohttp.ClientSession() as session:
            while not await self._is_healthy(session):
                await self._go_on("waiting for GET /health")
                await asyncio.sleep(POLL_S)

    async def wait_end(self) -> str:
        """Wait until vLLM ends by itself; return how."""
        if self._process is None:
            raise RuntimeError("vLLM was not started")
        return await self._process.wait()

    async def end(self, grace_s: float) -> str:
        """End everything of this life; return how vLLM ended."""
        how = "not started"
        if self._process is not None:
            how = await self._process.terminate_and_reap(grace_s)
            log.info("%s: vLLM %s", self.hello.engine, how)
        await self._server.close()
        return how

    # From the rank

    def peer_up(self, peer: EngineHello) -> None:
        """A peer has come, or come back in a new incarnation."""
        self._server.broadcast(self.links.peer_up(peer))
        self._note_change()

    def peer_down(self, engine: str, incarnation: int, reason: str) -> None:
        """That incarnation of a peer is gone."""
        self._server.broadcast(self.links.peer_down(engine, incarnation, reason))
        self._note_change()

    def deliver(self, bundles: Iterable[Bundle]) -> None:
        """Hand what peers offer to the workers it is for; what is for another life is dropped."""
        for bundle in bundles:
            if self.links.receive(bundle):
                self._server.send(bundle.receiver.tp_rank, bundle)

    # From the workers (WorkerEvents)

    def worker_joined(self, hello: WorkerHello) -> Sequence[ToWorker]:
        self.transport = hello.backend
        self.nics = sorted({*self.nics, *_NIC.findall(hello.transport)})
        log.info("worker %s is here: pid %d, %s", hello.worker, hello.pid, hello.transport)
        return self.links.greeting(hello.worker)

    def worker_offers(self, bundle: Bundle) -> None:
        if self.links.offer(bundle):
            self._events.bundle_offered(bundle)
            self._changed.set()

    def worker_reports(self, state: PeerState) -> None:
        log.info(
            "pair %s - %s %s",
            state.worker,
            state.peer,
            _how(state),
        )
        if state.path is not None and state.path.warning:
            log.warning("%s to %s: slow path: %s", state.worker, state.peer, state.path.warning)
        self.links.report(state, time.monotonic())
        self._note_change()

    def worker_left(self, worker: WorkerId, reason: str) -> None:
        log.info("worker %s left: %s", worker, reason)

    # Inside

    async def _spawn(self) -> None:
        self._port = free_port(self._bind_host)
        role: Role = "prefill" if self.hello.role == "prefill" else "decode"
        spec = EngineSpec(
            engine=self.hello.engine,
            role=role,
            incarnation=self.hello.incarnation,
            host=self._bind_host,
            port=self._port,
            bootstrap_socket=self._server.path,
        )
        self.url = spec.url
        self._events.url_chosen()
        command = vllm_command(self._job, spec)
        environment = vllm_environment(self._job, spec, os.environ, self._api_key, self._gpus)
        self._process = await VllmProcess.start(command, environment, self._log_file)
        log.info("%s: vLLM started, pid %d, %s", spec.engine, self._process.pid, spec.url)

    async def _until(self, is_done: Callable[[], bool], stage: str) -> None:
        while not is_done():
            await self._go_on(stage)
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_S)
            except asyncio.TimeoutError:
                continue

    async def _go_on(self, stage: str) -> None:
        """Raise EngineFailed if going on with `stage` is of no use."""
        who = self.hello.engine
        if self._lost_its_port():
            await self._spawn()
        if self._process is None or not self._process.is_running:
            raise EngineFailed(f"{who}: vLLM {self.outcome} while {stage}; see {self._log_file}")
        patience = PAIR_PATIENCE * self._job.rdma.connect_timeout_s
        failure = self.links.failure(time.monotonic(), patience)
        if failure is not None:
            raise EngineFailed(f"{failure} (for {patience:g} s)")
        if time.monotonic() > self._deadline:
            limit = self._job.orchestrator.engine_start_timeout_s
            missing = self.links.describe_missing()
            raise EngineFailed(
                f"{who}: not ready after {limit:g} s (orchestrator.engine_start_timeout_s), still "
                f"{stage}{f' ({missing})' if missing else ''}; see {self._log_file}"
            )

    def _lost_its_port(self) -> bool:
        """Whether vLLM ended because another process took its port; answers so only once."""
        if self._process is None or self._process.is_running or self._has_retried:
            return False
        if self._server.workers or not is_port_taken(self._bind_host, self._port):
            return False
        self._has_retried = True
        log.warning("%s: port %d was taken; once more", self.hello.engine, self._port)
        return True

    async def _is_healthy(self, session: aiohttp.ClientSession) -> bool:
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with session.get(self.url + "/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    def _note_change(self) -> None:
        self._changed.set()
        self._events.links_changed()


def _how(state: PeerState) -> str:
    if not state.connected:
        return f"down: {state.reason}"
    return "connected" if state.path is None else f"connected: {state.path.description}"
