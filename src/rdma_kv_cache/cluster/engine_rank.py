# SPDX-License-Identifier: Apache-2.0
"""An engine rank: starts its vLLM, brings it to READY with the others, keeps it alive.

States: STARTING -> READY -> (RESTARTING -> STARTING -> READY)* -> STOPPED, or LOST when it is
given up. RESTARTING still names the old incarnation, STARTING the new one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from rdma_kv_cache.cluster.engine_life import EngineFailed, EngineLife
from rdma_kv_cache.cluster.exchange import pack, unpack
from rdma_kv_cache.cluster.gpus import gpus_of_engine, gpus_to_show, visible_gpus
from rdma_kv_cache.cluster.hub_client import HubClient
from rdma_kv_cache.cluster.roles import new_incarnation
from rdma_kv_cache.cluster.tasks import cancel
from rdma_kv_cache.cluster.threads import in_thread
from rdma_kv_cache.cluster.world import WorldError
from rdma_kv_cache.config import JobError
from rdma_kv_cache.protocol.bootstrap import Bundles, PeerDown
from rdma_kv_cache.protocol.codec import ProtocolError, engine_api_key
from rdma_kv_cache.protocol.control import Announce, Heartbeat, Relay, Restart, Stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdma_kv_cache.cluster.run_dir import RunDir
    from rdma_kv_cache.cluster.world import World
    from rdma_kv_cache.config import JobConfig
    from rdma_kv_cache.protocol.bootstrap import Bundle, EngineHello
    from rdma_kv_cache.protocol.control import EngineState, FromHub

    _T = TypeVar("_T")

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


async def run(world: World, job: JobConfig, run_dir: RunDir) -> int:
    """Be the engine rank `world.engine` until the orchestrator says stop; return the exit code.

    0 after Stop or SIGTERM, 1 if the engine was given up or the orchestrator is gone. Call it
    from the main thread, and end the process by `os._exit`: a thread may wait in MPI.
    """
    try:
        rank = EngineRank(world, job, run_dir)
    except (JobError, WorldError) as error:
        log.error("%s: %s", world.engine, error)  # noqa: TRY400 - the text is whole
        return 1
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, rank.terminate)
    try:
        url = await in_thread(world.share_url)
        client = HubClient(url, world.secret, rank, rank.on_message, job.orchestrator.heartbeat_s)
        async with client as hub:
            return await rank.run(hub)
    except WorldError as error:
        log.error("%s: %s", world.engine, error)  # noqa: TRY400 - the text is whole
        return 1
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


class EngineRank:
    """The state machine. Everything but the MPI collectives runs on one event loop."""

    def __init__(self, world: World, job: JobConfig, run_dir: RunDir) -> None:
        self._world = world
        self._job = job
        self._bind_host = world.bind_host()
        visible = visible_gpus(os.environ)
        self._gpus = gpus_of_engine(world.hello, world.hellos, job, visible)
        self._gpus_to_show = gpus_to_show(self._gpus, world.hello, world.hellos, visible)
        self._api_key = engine_api_key(world.secret)
        self._log_file = run_dir.engine_log(world.engine)
        self._state: EngineState = "STARTING"
        self._reason = ""
        self._restarts: deque[float] = deque()
        self._restart_count = 0
        self._restart_asked: asyncio.Future[str] | None = None
        self._ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._has_sigterm = False
        self._is_exchanged = False
        self._hub: HubClient | None = None
        self._life = self._new_life(world.hello, world.peers())

    async def run(self, hub: HubClient) -> int:
        """Run until the end; return the exit code. Nothing of vLLM is left then."""
        self._hub = hub
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._watch_hub(hub))]
        watched: list[asyncio.Future[Any]] = [*tasks, self._ending]
        state: EngineState = "STOPPED"
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            reason = self._ending.result()
        except (EngineFailed, WorldError, ProtocolError, OSError) as error:
            state, reason = "LOST", str(error)
        finally:
            self._world.cancel()
            await cancel(tasks)
            await self._life.end(STOP_GRACE_S)
        log.log(logging.INFO if state == "STOPPED" else logging.ERROR, "%s: %s", state, reason)
        self._set_state(state, reason)
        await hub.flush(FLUSH_TIMEOUT_S)
        return 0 if state == "STOPPED" else 1

    def terminate(self) -> None:
        """SIGTERM: let the orchestrator drain first; at once if nothing is served or again."""
        if self._has_sigterm or self._state != "READY":
            self._end("SIGTERM")
            return
        self._has_sigterm = True
        log.info("SIGTERM: the orchestrator has %g s to drain", DRAIN_PATIENCE_S)
        asyncio.get_running_loop().call_later(DRAIN_PATIENCE_S, self._end, "SIGTERM")

    def on_message(self, message: FromHub) -> None:
        """Take in a message of the hub."""
        if isinstance(message, Announce):
            if message.hello.role != self._world.role:
                self._life.peer_up(message.hello)
        elif isinstance(message, PeerDown):
            self._life.peer_down(message.engine, message.incarnation, message.reason)
        elif isinstance(message, Relay):
            self._life.deliver(message.bundles.bundles)
        elif isinstance(message, Restart):
            if self._restart_asked is not None and not self._restart_asked.done():
                self._restart_asked.set_result(message.reason)
        elif isinstance(message, Stop):
            self._end(message.reason)

    # What the hub client asks (EngineView)

    def identity(self) -> tuple[EngineHello, str]:
        """Return who the engine is in its present life."""
        return self._life.hello, self._life.url

    def heartbeat(self) -> Heartbeat:
        """Return how the engine is."""
        return Heartbeat(
            engine=self._world.engine,
            incarnation=self._life.hello.incarnation,
            state=self._state,
            restarts=self._restart_count,
            peers_connected=self._life.links.connected(),
            peers_expected=len(self._life.links.peers),
            reason=self._reason,
            pid=self._life.pid,
            gpus=list(self._gpus),
            nics=self._life.nics,
            transport=self._life.transport,
            paths=self._life.links.paths(),
        )

    # What a life tells (LifeEvents)

    def url_chosen(self) -> None:
        """Tell the hub where the engine will answer, and in which incarnation."""
        if self._hub is not None:
            self._hub.send(Announce(*self.identity()))

    def bundle_offered(self, bundle: Bundle) -> None:
        """Send a bundle on; before the MPI exchange they are only collected."""
        if self._is_exchanged and self._hub is not None:
            self._hub.send(Relay(bundle.receiver.engine, Bundles([bundle])))

    def links_changed(self) -> None:
        """Tell the hub how many peers are connected."""
        if self._hub is not None:
            self._hub.beat()

    # The course of things

    async def _work(self) -> None:
        await self._first_start()
        while True:
            reason: str | None = await self._trouble()
            if self._has_sigterm:  # Slurm may send SIGTERM to vLLM, too
                self._end(f"SIGTERM, and vLLM {self._life.outcome}")
                return
            while reason is not None:
                reason = await self._restart(reason)

    async def _first_start(self) -> None:
        life, world = self._life, self._world
        await life.start()
        await life.wait_offers()
        outgoing = pack(life.links, world.secret)
        self._is_exchanged = True
        incoming = await self._while_alive(lambda: world.exchange(outgoing))
        life.deliver(unpack(incoming, world.secret))
        await life.wait_ready()
        await self._while_alive(world.barrier)
        self._set_state("READY", "")

    async def _trouble(self) -> str:
        """Wait until vLLM ends or the hub asks for a restart; return the reason."""
        self._restart_asked = asked = asyncio.get_running_loop().create_future()
        ended = asyncio.create_task(self._life.wait_end())
        try:
            await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._restart_asked = None
            ended.cancel()
        return f"vLLM {ended.result()}" if ended.done() else asked.result()

    async def _restart(self, reason: str) -> str | None:
        """Start vLLM again in a new incarnation; return why it did not start, None if it did."""
        self._spend_restart(reason)
        log.warning("restart %d: %s", self._restart_count, reason)
        self._set_state("RESTARTING", reason)
        await self._life.end(RESTART_GRACE_S)
        hello = msgspec.structs.replace(self._life.hello, incarnation=new_incarnation())
        self._life = self._new_life(hello, list(self._life.links.peers.values()))
        self._set_state("STARTING", reason)
        try:
            await self._life.start()
            await self._life.wait_ready()
        except EngineFailed as error:
            return str(error)
        self._set_state("READY", "")
        return None

    def _spend_restart(self, reason: str) -> None:
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        limit = self._job.orchestrator.max_restarts
        if len(self._restarts) >= limit:
            raise EngineFailed(
                f"{reason}; it was restarted {len(self._restarts)} times within "
                f"{RESTART_WINDOW_S:g} s (orchestrator.max_restarts = {limit}); "
                f"see {self._log_file}"
            )
        self._restarts.append(now)
        self._restart_count += 1

    async def _while_alive(self, collective: Callable[[], _T]) -> _T:
        """Await an MPI collective. Raises EngineFailed if vLLM ends meanwhile."""
        waiting = asyncio.create_task(in_thread(collective))
        ended = asyncio.create_task(self._life.wait_end())
        try:
            await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise EngineFailed(
                    f"vLLM {ended.result()} while the other engines start; see {self._log_file}"
                )
            return waiting.result()
        finally:
            waiting.cancel()
            ended.cancel()

    async def _watch_hub(self, hub: HubClient) -> None:
        """Raise EngineFailed when the orchestrator is gone: nobody can reach the engine then."""
        settings = self._job.orchestrator
        limit = HUB_PATIENCE * settings.health_timeout_s
        while hub.away_for() < limit:
            await asyncio.sleep(settings.heartbeat_s)
        raise EngineFailed(f"no orchestrator for {limit:g} s")

    def _new_life(self, hello: EngineHello, peers: list[EngineHello]) -> EngineLife:
        return EngineLife(
            hello,
            peers,
            self._job,
            bind_host=self._bind_host,
            api_key=self._api_key,
            log_file=self._log_file,
            events=self,
            gpus=self._gpus_to_show,
        )

    def _set_state(self, state: EngineState, reason: str) -> None:
        self._state, self._reason = state, reason
        log.info("%s %s %s", self._world.engine, state, reason)
        if self._hub is not None:
            self._hub.beat()

    def _end(self, reason: str) -> None:
        if not self._ending.done():
            self._ending.set_result(reason)
