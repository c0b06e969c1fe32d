# SPDX-License-Identifier: Apache-2.0
"""What Slurm says of the user's jobs: one squeue for all of them, heterogeneous components joined.

squeue's fixed format is the same from Slurm 22.05 to 26.05, which its JSON is not. Ended jobs are
listed too, for the site's MinJobAge (five minutes by default); later only accounting knows them,
where it is on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdma_kv_cache.slurm.programs import SlurmError, run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rdma_kv_cache.slurm.programs import Runner

# The name stands last: it alone may contain the separator.
_FIELDS = {
    "job": "%i",
    "state": "%T",
    "reason": "%r",
    "nodes": "%N",
    "node_count": "%D",
    "elapsed": "%M",
    "time_left": "%L",
    "start": "%S",
    "partition": "%P",
    "name": "%j",
}
_SQUEUE = ["squeue", "--me", "--noheader", "--states=all", "--format=" + "|".join(_FIELDS.values())]
# The same fields in the same order; of an ended job the time limit stands for the time left.
_SACCT = [
    *("sacct", "--noheader", "--parsable2", "--allocations"),
    "--format=JobID,State,ExitCode,NodeList,NNodes,Elapsed,Timelimit,Start,Partition,JobName",
]
# 7, a component 7+1; also the head of 7_3 and 7_[0-9]: arrays, which no job of ours is.
_JOB = re.compile(r"(\d+)(?:\+(\d+))?")
_UNSAID = frozenset({"", "(null)", "INVALID", "N/A", "NOT_SET", "None", "None assigned", "Unknown"})

_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
_ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "LAUNCH_FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "RECONFIG_FAIL",
        "REVOKED",
        "TIMEOUT",
    }
)


@dataclass(frozen=True)
class Component:
    """One component of a job; a plain job has one. Texts are as Slurm prints them."""

    offset: int
    state: str
    reason: str = ""
    """Why it waits or how it ended; from accounting its exit code (`status:signal`)."""
    nodes: str = ""
    """Host list; "" while it has none."""
    node_count: int = 0
    elapsed: str = ""
    time_left: str = ""
    start: str = ""
    """When it started, or is expected to; "" if Slurm does not say."""
    partition: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it has no nodes yet (or none again)."""
        return self.state in _WAITING

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return is_over(self.state)


@dataclass(frozen=True)
class QueuedJob:
    """A job as the scheduler sees it."""

    job_id: int
    name: str
    components: tuple[Component, ...]
    """In order; the first is the leader."""

    @property
    def leader(self) -> Component:
        """The component whose end is the job's end."""
        return self.components[0]

    @property
    def has_ended(self) -> bool:
        """Whether all of it is over."""
        return all(component.has_ended for component in self.components)


def is_over(state: str) -> bool:
    """Whether Slurm's `state` is one that a job does not leave."""
    return state in _ENDED


def query(runner: Runner = run) -> dict[int, QueuedJob]:
    """Ask Slurm once for all jobs of this user; by job id. Raises SlurmError."""
    found = _Found()
    is_first = True
    for line in runner(_SQUEUE).splitlines():
        values = line.split("|", len(_FIELDS) - 1)
        if len(values) == len(_FIELDS) and _JOB.match(values[0]):
            found.add(*values)
        elif is_first:
            raise SlurmError(f"squeue printed {line!r}, not a line of the format asked for")
        # Else it goes on with the name of the line before: names may contain newlines.
        is_first = False
    return found.jobs()


def ended(job_ids: Iterable[int], runner: Runner = run) -> dict[int, QueuedJob]:
    """Ask accounting once how jobs ended that squeue has forgotten; by job id.

    Raises SlurmError, also where accounting is off.
    """
    wanted = ",".join(map(str, sorted(job_ids)))
    if not wanted:
        return {}
    found = _Found()
    for line in runner([*_SACCT, f"--jobs={wanted}"]).splitlines():
        values = line.split("|", len(_FIELDS) - 1)
        if len(values) == len(_FIELDS) and _JOB.match(values[0]):
            found.add(*values)
    return found.jobs()


class _Found:
    """Gathers lines of components into jobs."""

    def __init__(self) -> None:
        self._components: dict[int, dict[int, Component]] = {}
        self._names: dict[int, str] = {}

    def add(
        self,
        job: str,
        state: str,
        reason: str,
        nodes: str,
        node_count: str,
        elapsed: str,
        time_left: str,
        start: str,
        partition: str,
        name: str,
    ) -> None:
        """Take in one line, its fields in the order of `_FIELDS`."""
        match = _JOB.fullmatch(job)
        if match is None:
            return
        job_id, offset = int(match[1]), int(match[2] or 0)
        self._names.setdefault(job_id, name)
        self._components.setdefault(job_id, {})[offset] = Component(
            offset=offset,
            # Accounting says by whom: "CANCELLED by 1000".
            state=state.partition(" ")[0],
            reason=_said(reason),
            nodes=_said(nodes),
            node_count=int(node_count) if node_count.isdigit() else 0,
            elapsed=_said(elapsed),
            time_left=_said(time_left),
            start=_said(start),
            partition=_said(partition),
        )

    def jobs(self) -> dict[int, QueuedJob]:
        """Return the jobs, their components in order."""
        return {
            job_id: QueuedJob(
                job_id, self._names[job_id], tuple(parts[offset] for offset in sorted(parts))
            )
            for job_id, parts in self._components.items()
        }


def _said(value: str) -> str:
    return "" if value in _UNSAID else value
