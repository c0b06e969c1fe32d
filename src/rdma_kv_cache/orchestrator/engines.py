# SPDX-License-Identifier: Apache-2.0
"""What the orchestrator knows of its engines."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rdma_kv_cache.protocol.bootstrap import EngineHello, PathInfo
    from rdma_kv_cache.protocol.control import EngineState, Heartbeat

log = logging.getLogger(__name__)

ROLES = ("prefill", "decode")


class Abortable(Protocol):
    """A request in flight to an engine."""

    def abort(self, reason: str) -> None:
        """End it now; whoever waits for it gets an error with `reason`."""


@dataclass(eq=False)
class Engine:
    """One vLLM server with its supervising rank. Times are `time.monotonic()` seconds."""

    name: str
    role: str
    host: str
    incarnation: int
    url: str = ""
    state: EngineState = "STARTING"
    reason: str = ""
    restarts: int = 0
    pid: int = 0
    gpus: list[str] = field(default_factory=list)
    nics: list[str] = field(default_factory=list)
    transport: str = ""
    paths: dict[str, PathInfo] = field(default_factory=dict)
    """The way of the bytes, by connected peer engine."""
    peers_connected: int = 0
    peers_expected: int = 0
    last_heartbeat: float | None = None
    last_healthy: float = 0.0
    failed_checks: int = 0
    last_answer: float = 0.0
    """When a leg last got something from the engine."""
    short_of_peers_since: float | None = None
    condemned: int = 0
    """The incarnation that was told to restart: its late READY heartbeats do not count."""
    legs: set[Abortable] = field(default_factory=set)

    @property
    def inflight(self) -> int:
        """Requests that this gateway has open at the engine."""
        return len(self.legs)

    @property
    def ready(self) -> bool:
        """Whether requests may be sent there."""
        return self.state == "READY"


class Registry:
    """All engines of the job, by name, and which (prefill, decode) pairs are usable.

    `listeners` are called with an engine after each change of its state or incarnation.
    """

    def __init__(self, hellos: Iterable[EngineHello]) -> None:
        self.engines: dict[str, Engine] = {
            hello.engine: Engine(hello.engine, hello.role, hello.host, hello.incarnation)
            for hello in hellos
            if hello.role in ROLES
        }
        self.listeners: list[Callable[[Engine], None]] = []
        self._served: set[tuple[int, int]] = set()

    def of_role(self, role: str) -> list[Engine]:
        """Return the engines of `role` in rank order."""
        return [engine for engine in self.engines.values() if engine.role == role]

    def ready(self, role: str) -> list[Engine]:
        """Return the engines of `role` that take requests."""
        return [engine for engine in self.of_role(role) if engine.ready]

    def connected_pairs(self) -> list[tuple[Engine, Engine]]:
        """Return the (prefill, decode) pairs that are READY with connected workers.

        Heartbeats count connected peers and do not name them, so an end without any peer rules
        its pairs out, and the served probe of each pair (`mark_served`) decides about the rest.
        """
        return [
            (prefill, decode)
            for prefill in self.ready("prefill")
            for decode in self.ready("decode")
            if prefill.peers_connected and decode.peers_connected
        ]

    def usable_pairs(self) -> list[tuple[Engine, Engine]]:
        """Return the connected pairs that have served a probe in their present incarnations."""
        return [pair for pair in self.connected_pairs() if self.has_served(*pair)]

    def has_served(self, prefill: Engine, decode: Engine) -> bool:
        """Whether a request went through this pair in its present incarnations."""
        return (prefill.incarnation, decode.incarnation) in self._served

    def mark_served(self, incarnations: tuple[int, int]) -> None:
        """Note that a probe went through the pair of these (prefill, decode) incarnations."""
        self._served.add(incarnations)

    def attached(self, engine: Engine, hello: EngineHello, url: str) -> None:
        """Take in the engine's identity from its Attach or Announce."""
        engine.last_heartbeat = time.monotonic()
        engine.url = url.rstrip("/")
        if hello.incarnation == engine.incarnation:
            return
        engine.incarnation = hello.incarnation
        engine.host = hello.host
        engine.peers_connected = 0
        self._set_state(engine, "STARTING", "new incarnation", force=True)

    def heartbeat(self, engine: Engine, message: Heartbeat) -> None:
        """Take in a heartbeat; READY counts only for the announced, not condemned incarnation."""
        engine.last_heartbeat = time.monotonic()
        engine.restarts, engine.pid = message.restarts, message.pid
        engine.gpus, engine.nics = message.gpus, message.nics
        engine.transport, engine.paths = message.transport, message.paths
        if message.incarnation == engine.incarnation:
            engine.peers_connected = message.peers_connected
            engine.peers_expected = message.peers_expected
        stale = message.incarnation != engine.incarnation or engine.incarnation == engine.condemned
        if message.state == "READY" and stale:
            return
        self._set_state(engine, message.state, message.reason)
        if not engine.ready or engine.peers_connected >= engine.peers_expected:
            engine.short_of_peers_since = None
        elif engine.short_of_peers_since is None:
            engine.short_of_peers_since = engine.last_heartbeat

    def lose(self, engine: Engine, reason: str) -> None:
        """Give the engine up until its rank attaches again."""
        engine.condemned = engine.incarnation
        self._set_state(engine, "LOST", reason)

    def condemn(self, engine: Engine, reason: str) -> None:
        """Take the engine out of service: it is about to be restarted."""
        engine.condemned = engine.incarnation
        self._set_state(engine, "RESTARTING", reason)

    def _set_state(
        self, engine: Engine, state: EngineState, reason: str, *, force: bool = False
    ) -> None:
        if state == engine.state and not force:
            return
        log.info("%s: %s -> %s %s", engine.name, engine.state, state, reason)
        engine.state, engine.reason = state, reason
        if state == "READY":
            engine.last_healthy = time.monotonic()
            engine.failed_checks = 0
        else:
            for leg in list(engine.legs):
                leg.abort(f"the engine is {state}: {reason}")
        # A peer that just came or went explains a shortage; give the set-up its time again.
        for other in self.engines.values():
            other.short_of_peers_since = None
        for listener in self.listeners:
            listener(engine)
