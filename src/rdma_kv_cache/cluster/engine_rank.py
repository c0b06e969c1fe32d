# SPDX-License-Identifier: Apache-2.0
"""An engine rank: starts its vLLM, brings it to READY with the others, keeps it alive.

States: STARTING -> READY -> (RESTARTING -> STARTING -> READY)* -> STOPPED, or LOST when it is
given up. RESTARTING still names the old incarnation, STARTING the new one.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from rdma_kv_cache.cluster.engine_life import EngineFailed, EngineLife
from rdma_kv_cache.cluster.exchange import pack, unpack
from rdma_kv_cache.cluster.hub_client import HubClient
from rdma_kv_cache.cluster.roles import new_incarnation
from rdma_kv_cache.cluster.threads import in_thread
from rdma_kv_cache.cluster.vllm_process import vllm_command
from rdma_kv_cache.cluster.world import WorldError
from rdma_kv_cache.protocol.bootstrap import Bundle, Bundles, EngineHello, PeerDown
from rdma_kv_cache.protocol.codec import ProtocolError, engine_api_key
from rdma_kv_cache.protocol.control import (
    Announce,
    EngineState,
    FromHub,
    Heartbeat,
    Relay,
    Restart,
    Stop,
)

if TYPE_CHECKING:
    from rdma_kv_cache.cluster.engine_life import BuildCommand
    from rdma_kv_cache.cluster.run_dir import RunDir
    from rdma_kv_cache.cluster.world import World
    from rdma_kv_cache.config import JobConfig

log = logging.getLogger(__name__)

# The orchestrator waits 15 s for its ranks to stop.
STOP_GRACE_S = 8.0
# A server that is restarted hangs more often than not, and its peers wait.
RESTART_GRACE_S = 2.0
# scancel and mpiexec send SIGTERM to all ranks at once; the orchestrator then drains for up to
# 30 s and says Stop, and ending vLLM before that would cut off what is in flight.
DRAIN_PATIENCE_S = 35.0
RESTART_WINDOW_S = 600.0
FLUSH_TIMEOUT_S = 2.0
# Nothing can reach the engines without the orchestrator: they end this many health timeouts
# after it has gone.
HUB_PATIENCE = 3


async def run(
    world: World, job: JobConfig, run_dir: RunDir, build_command: BuildCommand = vllm_command
) -> int:
    """Be the engine rank `world.engine` until the orchestrator says stop; return the exit code.

    0 after Stop or SIGTERM, 1 if the engine was given up or the orchestrator is gone. Call it
    from the main thread, and end the process by `os._exit`: a thread may wait in MPI.
    """
    rank = EngineRank(world, job, run_dir, build_command)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, rank.terminate)
    try:
        return await rank.run()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


class EngineRank:
    """The state machine. Everything runs on one event loop."""

    def __init__(
        self, world: World, job: JobConfig, run_dir: RunDir, build_command: BuildCommand
    ) -> None:
        self._world = world
        self._job = job
        self._run_dir = run_dir
        self._build_command = build_command
        self._bind_host = world.bind_host()
        self._peers = {peer.engine: peer for peer in world.peers()}
        self._state: EngineState = "STARTING"
        self._reason = ""
        self._restarts: deque[float] = deque()
        self._restart_count = 0
        self._restart_wanted: asyncio.Future[str] | None = None
        self._ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._terms = 0
        self._is_exchanged = False
        self._hub: HubClient | None = None
        self._life = self._new_life(world.hello)

    async def run(self) -> int:
        """Run to the end; return the exit code."""
        work = asyncio.create_task(self._work())
        code = 0
        try:
            await asyncio.wait({work, self._ending}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            log.info("%s stops: %s", self._world.engine, self._ending.result())
        except (EngineFailed, WorldError, ProtocolError) as error:
            log.error("%s is given up: %s", self._world.engine, error)  # noqa: TRY400
            self._set_state("LOST", str(error))
            code = 1
        finally:
            self._world.cancel()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        return code

    def terminate(self) -> None:
        """SIGTERM: let the orchestrator drain first, unless there is nothing to drain."""
        self._terms += 1
        if self._terms > 1 or self._state != "READY":
            self._end("SIGTERM")
        else:
            log.info("SIGTERM: waiting up to %g s for the orchestrator", DRAIN_PATIENCE_S)
            loop = asyncio.get_running_loop()
            loop.call_later(DRAIN_PATIENCE_S, self._end, "SIGTERM, and no word of the orchestrator")

    # EngineView, for the hub client

    def identity(self) -> tuple[EngineHello, str]:
        return self._life.hello, self._life.url

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            engine=self._world.engine,
            incarnation=self._life.hello.incarnation,
            state=self._state,
            restarts=self._restart_count,
            peers_connected=self._life.links.connected(),
            peers_expected=len(self._life.links.peers),
            reason=self._reason,
            pid=self._life.pid,
        )

    # LifeEvents

    def url_chosen(self) -> None:
        if self._hub is not None:
            self._hub.send(Announce(*self.identity()))

    def bundle_offered(self, bundle: Bundle) -> None:
        # Before the MPI exchange the bundles are only collected.
        if self._is_exchanged and self._hub is not None:
            self._hub.send(Relay(bundle.receiver.engine, Bundles([bundle])))

    def links_changed(self) -> None:
        if self._hub is not None:
            self._hub.beat()
