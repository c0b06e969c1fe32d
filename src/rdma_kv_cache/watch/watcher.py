# SPDX-License-Identifier: Apache-2.0
"""Gathers what there is to know of jobs: at most one squeue per interval for all of them.

How a job ended in Slurm is written down beside it (`slurm.json`), for squeue forgets it within
minutes, and accounting may be off.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import socket
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from rdma_kv_cache.cluster.run_dir import RunDir
from rdma_kv_cache.config.replace_file import replace_file
from rdma_kv_cache.slurm import queue, records
from rdma_kv_cache.slurm.programs import SlurmError, run
from rdma_kv_cache.slurm.queue import QueuedJob
from rdma_kv_cache.watch.batches import batch_view
from rdma_kv_cache.watch.folders import JobFolder, NoSuchJob, choose, find_folders, read_state
from rdma_kv_cache.watch.probe import Answer, Load, Target, ask_all, tokens_per_s
from rdma_kv_cache.watch.state import (
    Facts,
    current,
    is_loopback,
    judge,
    lost_components,
    ssh_line,
)
from rdma_kv_cache.watch.views import ComponentView, EngineView, JobView

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rdma_kv_cache.cluster.run_dir import RunState
    from rdma_kv_cache.slurm.programs import Runner
    from rdma_kv_cache.watch.folders import Reading

# The job names of sbatch/serve.sbatch and batch.sbatch, whose folders are made when they start.
_OUR_NAMES = ("rdma-kv-serve", "rdma-kv-batch")
# Every user's watch loop hits the one controller of a cluster.
QUERY_INTERVAL_S = 10.0
# While every service says itself that it is ready, Slurm has little to add.
CALM_INTERVAL_S = 60.0
# tokens/s of a single look: engines report once a step, and a step takes well below this.
SAMPLE_S = 1.0
_ENDED_FILE = "slurm.json"


class Watcher:
    """Looks at the jobs of one runs folder."""

    def __init__(
        self,
        runs: Path,
        login_host: str = "",
        runner: Runner = run,
        query_interval_s: float = QUERY_INTERVAL_S,
    ) -> None:
        self.runs = runs
        self._login_host = login_host
        self._runner = runner
        self._query_interval_s = query_interval_s
        self._queue: dict[int, QueuedJob] = {}
        self._queue_error = ""
        self._queried: float | None = None
        self._queried_at = 0.0
        self._is_calm = False
        self._without_accounting: set[int] = set()
        self._loads: dict[str, Load] = {}

    def folders(self) -> list[JobFolder]:
        """Return all jobs of the runs folder, the latest last; and ours that wait without one."""
        found = find_folders(self.runs)
        self.ask_slurm()
        known = {folder.job_id for folder in found}
        waiting = [
            self._without_folder(queued)
            for job_id, queued in sorted(self._queue.items())
            if queued.name in _OUR_NAMES and job_id not in known and queued.leader.is_waiting
        ]
        return [*found, *waiting]

    def find(self, text: str) -> JobFolder:
        """Return the job that the user means; also one in Slurm's queue that has no folder yet.

        Raises NoSuchJob.
        """
        try:
            return choose(text, find_folders(self.runs))
        except NoSuchJob as error:
            leader = text.partition("+")[0]
            self.ask_slurm()
            queued = self._queue.get(int(leader)) if leader.isdigit() else None
            if queued is None:
                hint = f" (Slurm was not asked: {self._queue_error})" if self._queue_error else ""
                raise NoSuchJob(f"{error} in {self.runs}{hint}") from error
            return self._without_folder(queued)

    def _without_folder(self, queued: QueuedJob) -> JobFolder:
        path = records.job_folder(self.runs, queued.name, queued.job_id)
        return JobFolder(path, queued.name, queued.job_id, RunDir(path / "attempt-0"), None)

    def ask_slurm(self) -> str:
        """Query the queue unless that was done just now; return why it failed, "" if not."""
        now = time.monotonic()
        interval_s = CALM_INTERVAL_S if self._is_calm else self._query_interval_s
        if self._queried is None or now - self._queried >= interval_s:
            self._queried, self._queried_at = now, time.time()
            try:
                self._queue = queue.query(self._runner)
                self._queue_error = ""
            except SlurmError as error:
                self._queue_error = str(error)
        return self._queue_error

    def expire(self) -> None:
        """Have the next look ask Slurm anew: something was changed there."""
        self._queried = None
        self._is_calm = False

    def is_over(self, job_id: int) -> bool:
        """Whether Slurm, as far as it was asked, lists nothing of the job that is not over."""
        error = self.ask_slurm()
        queued = self._queue.get(job_id)
        return not error and (queued is None or queued.has_ended)

    def look(self, folders: Sequence[JobFolder], sample_s: float = 0.0) -> list[JobView]:
        """Return the state of each job; with `sample_s` the services are asked twice, for rates."""
        if any(
            folder.record is not None and folder.record.submitted >= self._queried_at
            for folder in folders
        ):
            self.expire()  # the queue as known is from before that job
        if any(folder.job_id is not None for folder in folders):
            self.ask_slurm()
        readings = {folder.path: read_state(folder.run) for folder in folders}
        if any(self._has_started(folder, readings[folder.path]) for folder in folders):
            self.expire()  # once a start, and only then are its nodes known
            self.ask_slurm()
        known = self._known(folders, readings)
        targets = self._targets(folders, readings, known)
        answers = asyncio.run(ask_all(targets))
        if sample_s > 0 and any(answer.load is not None for answer in answers.values()):
            self._note_loads(answers)
            time.sleep(sample_s)
            answers = asyncio.run(ask_all(targets))
        views = [
            self._view(folder, readings[folder.path], known, answers.get(str(folder.path)))
            for folder in folders
        ]
        self._note_loads(answers)
        self._is_calm = all(view.verified for view in views)
        return views

    def _has_started(self, folder: JobFolder, reading: Reading) -> bool:
        """Whether the run has spoken since the queue, as it is known, had it waiting."""
        queued = None if folder.job_id is None else self._queue.get(folder.job_id)
        return (
            queued is not None and queued.leader.is_waiting and reading.written > self._queried_at
        )

    def _known(
        self, folders: Sequence[JobFolder], readings: dict[Path, Reading]
    ) -> dict[int, QueuedJob]:
        """What Slurm says of each job, or said at its end; accounting is asked once at most."""
        known: dict[int, QueuedJob] = {}
        missing: dict[int, JobFolder] = {}
        for folder in folders:
            if folder.job_id is None:
                continue
            if queued := self._queue.get(folder.job_id):
                known[folder.job_id] = queued
                if queued.has_ended:
                    _write_ended(folder, queued)
            elif queued := _read_ended(folder):
                known[folder.job_id] = queued
            else:
                missing[folder.job_id] = folder
        if self._queue_error:
            return known
        asked = {
            job_id: folder
            for job_id, folder in missing.items()
            if job_id not in self._without_accounting
            and not _has_last_word(folder, readings[folder.path])
        }
        # Where accounting is off that does not change while this looks on.
        self._without_accounting.update(asked)
        with contextlib.suppress(SlurmError):
            for job_id, queued in queue.ended(asked, self._runner).items():
                if job_id in asked and queued.has_ended:
                    known[job_id] = queued
                    _write_ended(asked[job_id], queued)
        return known

    def _targets(
        self,
        folders: Sequence[JobFolder],
        readings: dict[Path, Reading],
        known: dict[int, QueuedJob],
    ) -> dict[str, Target]:
        targets = {}
        for folder in folders:
            state = readings[folder.path].state
            if state is None or not state.url or state.state in ("FAILED", "DONE"):
                continue
            queued = known.get(folder.job_id) if folder.job_id is not None else None
            if queued is not None and queued.leader.has_ended:
                continue
            if is_loopback(state.url) and state.host != socket.gethostname():
                continue
            with contextlib.suppress(OSError):
                targets[str(folder.path)] = Target(state.url, folder.run.read_api_key())
        return targets

    def _view(
        self,
        folder: JobFolder,
        reading: Reading,
        known: dict[int, QueuedJob],
        answer: Answer | None,
    ) -> JobView:
        queued = None if folder.job_id is None else known.get(folder.job_id)
        record = folder.record
        facts = Facts(
            kind=folder.kind,
            is_slurm=folder.job_id is not None,
            reading=reading,
            queued=queued,
            queue_error=self._queue_error,
            answer=answer,
            is_process_gone=folder.job_id is None and _is_process_gone(reading),
        )
        state, detail = judge(facts)
        told = current(reading, queued)
        is_up = told is not None and state in ("STARTING", "READY", "DRAINING")
        url = told.url if told is not None and is_up else ""
        load = None if answer is None else answer.load
        view = JobView(
            job=folder.label,
            job_id=folder.job_id,
            name=folder.name,
            kind=facts.kind,
            state=state,
            detail=detail,
            url=url,
            verified=answer is not None and answer.ready,
            tunnel=self._tunnel(url, told.host) if told is not None and url else "",
            api_key_file=told.api_key_file if told is not None and is_up else "",
            run_dir=str(folder.run.path),
            attempt=folder.attempt,
            job_file="" if record is None else record.job_file,
            output="" if record is None else record.output,
            submitted="" if record is None else _local_time(record.submitted),
            follows=None if record is None else record.predecessor,
            engines=_engines(answer, told if is_up else None),
            requests={}
            if load is None
            else {"inflight": load.inflight, "running": load.running, "waiting": load.waiting},
            tokens_per_s=tokens_per_s(self._loads.get(str(folder.path)), load),
            batch=batch_view(folder, has_ended=state in ("FAILED", "DONE")),
            notes=self._notes(facts, state, told.host if told is not None else ""),
        )
        return view if queued is None else _with_slurm(view, queued)

    def _notes(self, facts: Facts, state: str, host: str) -> list[str]:
        notes = lost_components(facts.queued)
        answer = facts.answer
        if answer is not None:
            notes += [
                f"{engine.name} is {engine.state}: {engine.reason or 'no reason given'}"
                for engine in answer.engines
                if state == "READY" and engine.state != "READY"
            ]
            notes += _slow_paths(answer.engines)
        if state == "READY" and (answer is None or not answer.ready):
            why = f"it listens on {host} only" if answer is None else answer.error
            notes.append(f"READY by its state file, not checked from here: {why}")
        if facts.is_slurm and facts.queue_error:
            notes.append(f"Slurm could not be asked: {facts.queue_error}")
        if facts.reading.problem:
            notes.append(facts.reading.problem)
        return notes

    def _tunnel(self, url: str, host: str) -> str:
        return ssh_line(url, host, _user(), self._login_host or self._this_host)

    @cached_property
    def _this_host(self) -> str:
        return socket.getfqdn()

    def _note_loads(self, answers: dict[str, Answer]) -> None:
        for path, answer in answers.items():
            if answer.load is not None:
                self._loads[path] = answer.load


def _with_slurm(view: JobView, queued: QueuedJob) -> JobView:
    leader = queued.leader
    return msgspec.structs.replace(
        view,
        start=leader.start,
        elapsed=leader.elapsed,
        time_left="" if leader.has_ended else leader.time_left,
        partition=leader.partition,
        components=[
            ComponentView(part.offset, part.state, part.nodes, part.node_count, part.reason)
            for part in queued.components
        ],
    )


def _engines(answer: Answer | None, told: RunState | None) -> list[EngineView]:
    """The engines by the service's own account, else by the state file."""
    if answer is not None and answer.engines:
        return list(answer.engines)
    return [
        EngineView(
            name=engine.name,
            role=engine.role,
            host=urlsplit(engine.url).hostname or "",
            url=engine.url,
            state=engine.state,
            restarts=engine.restarts,
        )
        for engine in (told.engines if told is not None else [])
    ]


def _slow_paths(engines: Iterable[EngineView]) -> list[str]:
    """A line for each reason that a path is slow; both ends of a pair may give the same."""
    pairs: dict[str, list[str]] = {}
    for engine in engines:
        for path in engine.paths:
            if path.warning and engine.role == "prefill":
                pairs.setdefault(path.warning, []).append(f"{engine.name} to {path.peer}")
    return [f"slow path {', '.join(names)}: {warning}" for warning, names in pairs.items()]


def _has_last_word(folder: JobFolder, reading: Reading) -> bool:
    """Whether the run itself said how it ended; of a batch only Slurm knows the exit code."""
    state = reading.state
    return state is not None and (
        state.state == "FAILED" or (state.state == "DONE" and folder.kind == "serve")
    )


def _is_process_gone(reading: Reading) -> bool:
    state = reading.state
    if state is None or not state.pid or state.host != socket.gethostname():
        return False
    return not Path(f"/proc/{state.pid}").exists()


def _write_ended(folder: JobFolder, queued: QueuedJob) -> None:
    """Note how Slurm says the job ended. It is a convenience: what cannot be written is not."""
    path = folder.path / _ENDED_FILE
    if path.exists():
        return
    with contextlib.suppress(OSError):
        replace_file(path, msgspec.json.encode(queued) + b"\n")


def _read_ended(folder: JobFolder) -> QueuedJob | None:
    try:
        data = (folder.path / _ENDED_FILE).read_bytes()
        return msgspec.json.decode(data, type=QueuedJob)
    except (OSError, msgspec.MsgspecError):
        return None


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
