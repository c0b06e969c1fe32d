# SPDX-License-Identifier: Apache-2.0
"""Supervision of the engines: heartbeats, GET /health, and a served probe of every pair."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import aiohttp

from rdma_kv_cache.orchestrator.probe import ProbeError, serve_probe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rdma_kv_cache.config import JobConfig
    from rdma_kv_cache.orchestrator.engines import Engine, Registry
    from rdma_kv_cache.orchestrator.hub import Hub

log = logging.getLogger(__name__)

PROBE_ATTEMPTS = 3
# A hung engine is to be found within health_timeout_s, so one check may take only part of it.
CHECKS_PER_TIMEOUT = 4
RECONNECT_ATTEMPTS = 3
_CONCURRENT_PROBES = 8


class Monitor:
    """Watches the engines; restarts one that hangs, gives up one whose rank is silent."""

    def __init__(
        self, registry: Registry, hub: Hub, session: aiohttp.ClientSession, job: JobConfig
    ) -> None:
        self._registry = registry
        self._hub = hub
        self._session = session
        self._settings = job.orchestrator
        self._probe_timeout_s = job.rdma.transfer_timeout_s + self._settings.health_timeout_s
        # Workers connect anew by themselves, so a lost pair of engines that serve gets its time.
        self._reconnect_s = RECONNECT_ATTEMPTS * job.rdma.connect_timeout_s
        self._next_peer_check = 0.0
        self._last_silence_check = time.monotonic()
        self._probe_slots = asyncio.Semaphore(_CONCURRENT_PROBES)
        self._proved = False
        self._probes: dict[tuple[int, int], asyncio.Task[bool]] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            await asyncio.gather(
                self._every_heartbeat(self._check_silence),
                self._every_heartbeat(self._check_health),
                self._every_heartbeat(self._check_peers),
                self._every_heartbeat(self._probe_new_pairs),
            )
        finally:
            for task in list(self._probes.values()):
                task.cancel()

    async def prove_pairs(self) -> None:
        """Serve a probe through every pair. Raises ProbeError after PROBE_ATTEMPTS at one pair."""
        await asyncio.gather(
            *(
                self._prove(prefill, decode)
                for prefill in self._registry.of_role("prefill")
                for decode in self._registry.of_role("decode")
            )
        )
        self._proved = True

    async def _prove(self, prefill: Engine, decode: Engine) -> None:
        for number in range(1, PROBE_ATTEMPTS):
            if await self._try_probe(prefill, decode):
                return
            log.info("probe %d of %d failed", number, PROBE_ATTEMPTS)
            await asyncio.sleep(self._settings.heartbeat_s)
        await self._probe(prefill, decode)

    async def _probe(self, prefill: Engine, decode: Engine) -> None:
        incarnations = prefill.incarnation, decode.incarnation
        async with self._probe_slots:
            await serve_probe(self._session, prefill, decode, self._probe_timeout_s)
        self._registry.mark_served(incarnations)

    async def _every_heartbeat(self, check: Callable[[], Awaitable[None]]) -> None:
        while True:
            await check()
            await asyncio.sleep(self._settings.heartbeat_s)

    async def _check_silence(self) -> None:
        now = time.monotonic()
        # When this process was not scheduled itself, the heartbeats of that time are unread.
        stalled = max(0.0, now - self._last_silence_check - 2 * self._settings.heartbeat_s)
        self._last_silence_check = now
        for engine in self._registry.engines.values():
            if engine.last_heartbeat is None or engine.state in ("LOST", "STOPPED"):
                continue
            engine.last_heartbeat += stalled
            silent = now - engine.last_heartbeat
            if silent > self._settings.health_timeout_s:
                self._registry.lose(engine, f"no heartbeat of its rank for {silent:.1f} s")

    async def _check_health(self) -> None:
        ready = [engine for engine in self._registry.engines.values() if engine.ready]
        await asyncio.gather(*map(self._check_engine, ready))

    async def _check_engine(self, engine: Engine) -> None:
        limit = self._settings.health_timeout_s
        timeout = aiohttp.ClientTimeout(total=limit / CHECKS_PER_TIMEOUT)
        incarnation = engine.incarnation
        try:
            async with self._session.get(engine.url + "/health", timeout=timeout) as response:
                if response.status == 200:
                    engine.last_healthy = time.monotonic()
                    engine.failed_checks = 0
                    return
                reason = f"HTTP {response.status}"
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            reason = str(error) or f"no answer in {limit / CHECKS_PER_TIMEOUT:g} s"
        if not engine.ready or engine.incarnation != incarnation:
            return
        engine.failed_checks += 1
        unhealthy = time.monotonic() - engine.last_healthy
        # One check may fail because this process was not scheduled itself.
        if unhealthy > limit and engine.failed_checks > 1:
            self._hub.restart(engine, f"GET /health fails for {unhealthy:.1f} s: {reason}")

    async def _check_peers(self) -> None:
        """Restart what keeps a pair apart although all engines run.

        An engine that does not serve a request of its own hangs (a stopped engine core still
        answers GET /health). If all serve and their workers do not find together again,
        prefill restarts, since decode can do without it meanwhile.
        """
        engines = list(self._registry.engines.values())
        now = time.monotonic()
        if now < self._next_peer_check or not all(engine.ready for engine in engines):
            return
        since = {e: now - e.short_of_peers_since for e in engines if e.short_of_peers_since}
        patience = self._settings.health_timeout_s
        if max(since.values(), default=0.0) < patience:
            return
        served = await asyncio.gather(*map(self._serves_alone, engines))
        suspects = [engine for engine, serves in zip(engines, served, strict=True) if not serves]
        reason = "it lost its peers and does not serve a request"
        if not suspects:
            self._next_peer_check = now + patience
            short = [e for e, seconds in since.items() if seconds > patience + self._reconnect_s]
            suspects = [engine for engine in short if engine.role == "prefill"] or short
            reason = "its connection to a peer does not come back"
        for engine in suspects:
            if engine.ready:
                self._hub.restart(engine, reason)

    async def _serves_alone(self, engine: Engine) -> bool:
        started = time.monotonic()
        try:
            await serve_probe(self._session, None, engine, self._settings.health_timeout_s)
        except ProbeError as error:
            log.warning("%s", error)
            # Under load the probe may wait its turn while others are answered.
            return engine.last_answer > started
        return True

    async def _probe_new_pairs(self) -> None:
        """Probe the pairs of restarted engines; each on its own, since one may hang."""
        if not self._proved:
            return
        for prefill, decode in self._registry.connected_pairs():
            if not self._registry.has_served(prefill, decode):
                self._start_probe(prefill, decode)

    def _start_probe(self, prefill: Engine, decode: Engine) -> None:
        pair = prefill.incarnation, decode.incarnation
        if pair not in self._probes:
            task = asyncio.ensure_future(self._try_probe(prefill, decode))
            task.add_done_callback(lambda _task: self._probes.pop(pair, None))
            self._probes[pair] = task

    async def _try_probe(self, prefill: Engine, decode: Engine) -> bool:
        try:
            await self._probe(prefill, decode)
        except ProbeError as error:
            log.warning("%s", error)
            return False
        return True
