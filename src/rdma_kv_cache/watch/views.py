# SPDX-License-Identifier: Apache-2.0
"""What is shown of a job: the objects that --json prints and the tables are made of."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["PENDING", "STARTING", "READY", "DRAINING", "FAILED", "DONE"]


class PathView(msgspec.Struct, frozen=True):
    """The way of the KV to one peer engine."""

    peer: str
    backend: str = ""
    description: str = ""
    warning: str = ""


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """One engine as /nodes tells of it; what an older service does not tell keeps its default."""

    name: str
    role: str
    host: str = ""
    url: str = ""
    state: str = ""
    reason: str = ""
    restarts: int = 0
    peers_connected: int = 0
    peers_expected: int = 0
    inflight: int = 0
    gpus: list[str] = []
    nics: list[str] = []
    transport: str = ""
    paths: list[PathView] = []
    running: int | None = None
    waiting: int | None = None
    kv_cache_used: float | None = None


class ComponentView(msgspec.Struct, frozen=True):
    """One component of the job in Slurm."""

    offset: int
    state: str
    nodes: str
    node_count: int
    reason: str


class BatchView(msgspec.Struct, frozen=True):
    """How far a batch is; earlier attempts, and jobs that it continues, are counted."""

    total: int
    answered: int
    failed: int
    per_minute: float | None = None
    """Of the job's own run; None before that has a result."""
    remaining_s: float | None = None
    """At that rate; None also when the job is over."""


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as `list` and `status` show it, and the object that --json prints."""

    job: str
    """Job id; the run folder's name without Slurm."""
    job_id: int | None
    name: str
    kind: str
    state: State
    detail: str
    """Why it waits or failed, or the stage of its start."""
    url: str = ""
    verified: bool = False
    """Whether the service answered just now that it is ready."""
    tunnel: str = ""
    """The line that makes `url` reachable from the user's own machine."""
    api_key_file: str = ""
    run_dir: str = ""
    attempt: int | None = None
    job_file: str = ""
    output: str = ""
    """Of a batch job: its answer file."""
    submitted: str = ""
    start: str = ""
    elapsed: str = ""
    time_left: str = ""
    partition: str = ""
    follows: int | None = None
    """The job that this one succeeds."""
    components: list[ComponentView] = []
    engines: list[EngineView] = []
    requests: dict[str, int | None] = {}
    """inflight, running and waiting."""
    tokens_per_s: float | None = None
    batch: BatchView | None = None
    notes: list[str] = []
    """What the user should know beside: a lost component, what could not be asked."""

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return self.state in ("FAILED", "DONE")
