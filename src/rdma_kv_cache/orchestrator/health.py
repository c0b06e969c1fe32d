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

MISSED_HEARTBEATS = 5
PROBE_ATTEMPTS = 3
# A hung engine is to be found within health_timeout_s, so one check may take only part of it.
CHECKS_PER_TIMEOUT = 4
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
        limit = MISSED_HEARTBEATS * self._settings.heartbeat_s
        for engine in self._registry.engines.values():
            if engine.last_heartbeat is None or engine.state in ("LOST", "STOPPED"):
                continue
            silent = time.monotonic() - engine.last_heartbeat
            if silent > limit:
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
                    return
                reason = f"HTTP {response.status}"
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            reason = str(error) or f"no answer in {limit / CHECKS_PER_TIMEOUT:g} s"
        unhealthy = time.monotonic() - engine.last_healthy
        if engine.ready and engine.incarnation == incarnation and unhealthy > limit:
            self._hub.restart(engine, f"GET /health fails for {unhealthy:.1f} s: {reason}")

    async def _check_peers(self) -> None:
        """Mend a pair that lost its connection although both engines run.

        An endpoint belongs to one incarnation of both ends, so only a restart brings the pair
        back. The engine that does not serve a request of its own is the one that hangs (a
        stopped engine core still answers GET /health); if all serve, prefill restarts, since
        decode can do without it meanwhile.
        """
        engines = list(self._registry.engines.values())
        if not all(engine.ready for engine in engines):
            return
        patience = self._settings.health_timeout_s
        now = time.monotonic()
        short = [
            engine
            for engine in engines
            if engine.short_of_peers_since and now - engine.short_of_peers_since > patience
        ]
        if not short:
            return
        served = await asyncio.gather(*map(self._serves_alone, engines))
        hung = [engine for engine, serves in zip(engines, served, strict=True) if not serves]
        suspects = hung or [engine for engine in short if engine.role == "prefill"] or short
        reason = "it does not serve a request" if hung else "its connection to a peer was lost"
        for engine in suspects:
            if engine.ready:
                self._hub.restart(engine, reason)

    async def _serves_alone(self, engine: Engine) -> bool:
        try:
            await serve_probe(self._session, None, engine, self._settings.health_timeout_s)
        except ProbeError as error:
            log.warning("%s", error)
            return False
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
