# SPDX-License-Identifier: Apache-2.0
"""Where the run stands, as state.json and /nodes show it."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from rdma_kv_cache.cluster.run_dir import EngineStatus, JobState, RunDir, RunState

if TYPE_CHECKING:
    from rdma_kv_cache.orchestrator.engines import Engine, Registry


def describe_engine(engine: Engine) -> dict[str, Any]:
    """Return what /nodes tells of an engine."""
    return {
        "name": engine.name,
        "role": engine.role,
        "host": engine.host,
        "url": engine.url,
        "state": engine.state,
        "reason": engine.reason,
        # JSON readers that keep numbers as doubles would round 63 bits.
        "incarnation": str(engine.incarnation),
        "restarts": engine.restarts,
        "pid": engine.pid,
        "gpus": engine.gpus,
        "nics": engine.nics,
        "transport": engine.transport,
        "paths": [
            {
                "peer": peer,
                "backend": path.backend,
                "description": path.description,
                "warning": path.warning,
            }
            for peer, path in sorted(engine.paths.items())
        ],
        "peers_connected": engine.peers_connected,
        "peers_expected": engine.peers_expected,
        "inflight": engine.inflight,
    }


class Progress:
    """The run's state; each change of it or of an engine is written to the run folder."""

    def __init__(self, run_dir: RunDir, registry: Registry, api_key: str | None) -> None:
        self.state: JobState = "STARTING"
        self.stage = ""
        self.reason = ""
        self.url = ""
        self._run_dir = run_dir
        self._registry = registry
        self._api_key_file = "" if api_key is None else str(run_dir.write_api_key(api_key))
        registry.listeners.append(self._engine_changed)

    def enter(self, state: JobState, stage: str, reason: str = "") -> None:
        """Go to `state`, write it and note the event."""
        self.state, self.stage, self.reason = state, stage, reason
        self._run_dir.append_event(event="run", state=state, stage=stage, reason=reason)
        self.write()

    def _engine_changed(self, engine: Engine) -> None:
        self._run_dir.append_event(
            event="engine",
            engine=engine.name,
            host=engine.host,
            state=engine.state,
            incarnation=str(engine.incarnation),
            reason=engine.reason,
        )
        self.write()

    def write(self) -> None:
        """Write state.json."""
        engines = [
            EngineStatus(e.name, e.role, e.url, e.state, e.incarnation, e.restarts, e.pid)
            for e in self._registry.engines.values()
        ]
        self._run_dir.write_state(
            RunState(
                state=self.state,
                stage=self.stage,
                reason=self.reason,
                url=self.url,
                api_key_file=self._api_key_file,
                pid=os.getpid(),
                host=socket.gethostname(),
                engines=engines,
            )
        )
