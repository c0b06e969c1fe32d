# SPDX-License-Identifier: Apache-2.0
"""One job's state, out of what Slurm, the state file and the service say. Pure: nothing is asked.

Nothing here is read out of a log. The service's own answer goes first, then Slurm's word on a job
that waits or has ended, then the state file, which may be late by what the file system caches.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from rdma_kv_cache.cluster.run_dir import RunState
    from rdma_kv_cache.slurm.queue import QueuedJob
    from rdma_kv_cache.watch.folders import Reading
    from rdma_kv_cache.watch.probe import Answer
    from rdma_kv_cache.watch.views import State

Verdict: TypeAlias = "tuple[State, str]"
"""A state and its reason or stage."""

# A state file this much older than the job's start is of an earlier attempt: Slurm waits 120 s
# before it starts a requeued job again, and clocks of a cluster differ by less.
STALE_S = 60.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_MEANING = {
    "BOOT_FAIL": "a node did not boot",
    "CANCELLED": "it was cancelled before it was done",
    "DEADLINE": "it could not end before its deadline",
    "FAILED": "it ended with an error; its logs say which",
    "LAUNCH_FAILED": "a node could not start it",
    "NODE_FAIL": "a node was lost",
    "OUT_OF_MEMORY": "it used more memory than it asked for",
    "PREEMPTED": "it was preempted",
    "TIMEOUT": "it reached its time limit",
}
# What a service is told to stop by; it is not its failure.
_PLANNED = frozenset({"CANCELLED", "PREEMPTED", "TIMEOUT"})
_NEVER = {
    "PartitionTimeLimit": "it asks for more time than the partition allows: lower slurm.time",
    "PartitionNodeLimit": "it asks for more nodes than the partition has",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "BadConstraints": "no node fits its constraint and gres",
    "DependencyNeverSatisfied": "the job it waits for did not end as needed",
    "JobHeldUser": "it is held: scontrol release it",
    "JobHeldAdmin": "an administrator holds it",
    "AccountNotAllowed": "the account may not use this partition: set slurm.account",
}


@dataclass(frozen=True)
class Facts:
    """What is known of one job."""

    kind: str
    """serve or batch; "" if unknown."""
    is_slurm: bool
    """Whether it is a Slurm job."""
    reading: Reading
    queued: QueuedJob | None = None
    queue_error: str = ""
    """Why Slurm could not be asked."""
    answer: Answer | None = None
    """None if the service was not asked."""
    is_process_gone: bool = False
    """Whether rank 0 ran on this host and is no more."""


def judge(facts: Facts) -> Verdict:
    """Say where the job stands."""
    queued = facts.queued
    if queued is None:
        return _without_slurm(facts)
    leader = queued.leader
    if leader.has_ended:
        return _after_end(facts, queued)
    if leader.is_waiting and not _answers_as_itself(facts):
        return "PENDING", waiting_reason(queued)
    if leader.state == "CONFIGURING":
        return "STARTING", "Slurm prepares the nodes"
    state = current(facts.reading, queued)
    if state is None:
        return "STARTING", facts.reading.problem or "the batch script starts"
    if state.state == "DONE":
        return "DRAINING", "the engines have stopped, the job ends"
    return _by_service(state, facts)


def current(reading: Reading, queued: QueuedJob | None) -> RunState | None:
    """Return the state file's content unless it is of an attempt before the job's present one."""
    if queued is None or queued.leader.is_waiting:  # then Slurm's start is what it expects
        return reading.state
    try:
        started = datetime.fromisoformat(queued.leader.start).timestamp()
    except ValueError:
        return reading.state
    return None if reading.written + STALE_S < started else reading.state


def waiting_reason(queued: QueuedJob) -> str:
    """Say what the job waits for, by the first component that waits for something of its own."""
    reasons = [component.reason for component in queued.components if component.reason]
    reason = reasons[0] if reasons else "not considered yet"
    if why := _NEVER.get(reason):
        return f"{reason}: {why}"
    start = queued.leader.start
    return f"{reason}, expected to start {start.replace('T', ' ')}" if start else reason


def lost_components(queued: QueuedJob | None) -> list[str]:
    """Say which components are over while the leader runs."""
    if queued is None or queued.leader.has_ended:
        return []
    return [
        f"component {part.offset} ({part.nodes or 'no nodes'}) is {part.state}: its engines are lost"
        for part in queued.components[1:]
        if part.has_ended
    ]


def ssh_line(url: str, host: str, user: str, login: str) -> str:
    """Return the ssh command that makes `url` reachable at the same port of the user's machine.

    `host` is where the service runs, `login` the host that users log in to.
    """
    parts = urlsplit(url)
    if not parts.hostname or not parts.port:
        return ""
    if parts.hostname in _LOOPBACK:
        # Bound to its own node only: the last hop must end there.
        jump = ["-J", f"{user}@{login}"] if login != host else []
        forward = f"{parts.port}:localhost:{parts.port}"
        return shlex.join(["ssh", "-N", *jump, "-L", forward, f"{user}@{host}"])
    target = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return shlex.join(["ssh", "-N", "-L", f"{parts.port}:{target}:{parts.port}", f"{user}@{login}"])


def is_loopback(url: str) -> bool:
    """Whether the service is bound to its own host only."""
    return urlsplit(url).hostname in _LOOPBACK


def _by_service(state: RunState, facts: Facts) -> Verdict:
    """The state of a job that runs: by the service if it answers, else by its file."""
    answer = facts.answer
    if facts.is_process_gone and state.state not in ("FAILED", "DONE"):
        return "FAILED", f"the orchestrator (pid {state.pid} on {state.host}) has died"
    if state.state in ("FAILED", "DONE") or answer is None or answer.error:
        if answer is not None and answer.refused and state.state in ("READY", "DRAINING"):
            # Bound before it is published, so it is gone; Slurm has not noticed yet.
            return "DRAINING", f"nothing listens any more at {state.url}"
        return state.state, state.reason or _stage(state)
    if answer.ready:
        return "READY", ""
    told = answer.state or state.state
    if told == "READY":
        # Up, but no engine that could answer is left for the moment.
        return "STARTING", answer.reason
    return told, state.reason or answer.reason or _stage(state)


def _answers_as_itself(facts: Facts) -> bool:
    """Whether the job's service answers: what Slurm said of it before is out of date then.

    By the key: at the address of an earlier attempt another job may answer.
    """
    return facts.answer is not None and facts.answer.state is not None


def _stage(state: RunState) -> str:
    return "" if state.state in ("READY", "DONE") else state.stage


def _without_slurm(facts: Facts) -> Verdict:
    state = facts.reading.state
    answers = facts.answer is not None and not facts.answer.error
    is_forgotten = facts.is_slurm and not facts.queue_error and not answers
    if state is None:
        if is_forgotten:
            return "FAILED", "Slurm does not know it (any more), and it left no state"
        if facts.is_slurm:
            return "PENDING", f"not known: {facts.queue_error or facts.reading.problem}"
        return "STARTING", facts.reading.problem or "the ranks start"
    if is_forgotten and state.state not in ("FAILED", "DONE"):
        return "FAILED", f"it ended while {state.state} ({state.stage}) and could not say why"
    return _by_service(state, facts)


def _after_end(facts: Facts, queued: QueuedJob) -> Verdict:
    """The verdict on a job that Slurm calls over.

    A service is done when it stopped in order, however Slurm came to ask for it; a batch only if
    its own exit code was 0, for a signal or the time limit leave prompts unanswered.
    """
    state = current(facts.reading, queued)
    if state is not None and state.state == "FAILED":
        return "FAILED", state.reason or _stage(state)
    ended = queued.leader.state
    is_orderly = state is not None and state.state == "DONE"
    if ended == "COMPLETED" or (is_orderly and facts.kind != "batch" and ended in _PLANNED):
        return "DONE", ""
    meaning = _MEANING.get(ended, "it ended")
    code = queued.leader.reason
    if facts.kind == "batch" and ended in ("CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"):
        meaning += "; submit it again to continue"
    if re.fullmatch(r"\d+:\d+", code) and code != "0:0":
        meaning += f" (exit code {code})"
    return "FAILED", meaning if ended == "FAILED" else f"{ended}: {meaning}"
