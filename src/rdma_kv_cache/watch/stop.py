# SPDX-License-Identifier: Apache-2.0
"""Ends jobs: first in order, which drains them, and by Slurm's own cancellation if that fails."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rdma_kv_cache.slurm import records
from rdma_kv_cache.slurm.programs import SlurmError, run
from rdma_kv_cache.slurm.queue import is_over
from rdma_kv_cache.watch.folders import read_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rdma_kv_cache.slurm.programs import Runner
    from rdma_kv_cache.slurm.records import Record
    from rdma_kv_cache.watch.folders import JobFolder
    from rdma_kv_cache.watch.views import JobView
    from rdma_kv_cache.watch.watcher import Watcher

POLL_S = 0.5
# After its run has ended a batch script has only to return; Slurm tells within a second or two.
LEAVE_TIMEOUT_S = 15.0
# scancel: TERM, and KILL after the site's KillWait (30 s by default).
KILL_TIMEOUT_S = 60.0
# In these waits Slurm is asked with growing gaps, so that many stops do not become a load.
ASK_AGAIN_S = (1.0, 2.0, 4.0, 8.0)
_ALREADY_OVER = ("already completing or completed", "Invalid job id")


class Stopped(msgspec.Struct, frozen=True):
    """What became of one job."""

    job: str
    is_over: bool
    how: str
    """What was done, or why nothing helped."""


class Stopper:
    """Stops jobs of one runs folder."""

    def __init__(
        self, watcher: Watcher, runner: Runner = run, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._watcher = watcher
        self._runner = runner
        self._say = say

    def stop(self, folder: JobFolder, grace_s: float) -> Stopped:
        """Stop one job and wait for its end; `grace_s` of 0 cancels it at once.

        Raises SlurmError if Slurm cannot be asked.
        """
        (view,) = self._watcher.look([folder])
        if view.has_ended and not _is_live(view):
            return Stopped(folder.label, True, f"was {view.state} already")
        if folder.job_id is None:
            return self._stop_local(folder, grace_s)
        if error := self._watcher.ask_slurm():
            raise SlurmError(error)
        if view.state == "PENDING":
            return self._cancel(folder.job_id, "cancelled before it started")
        if grace_s > 0:
            self._say(f"{folder.label}: stopping; requests in flight are answered first")
            if view.state != "DRAINING":  # a second signal would cut that short
                # To the batch script, our own command, which drains; scancel alone tells all ranks.
                self._scancel("--batch", "--signal=TERM", str(folder.job_id))
            if self._ends(folder, folder.job_id, grace_s):
                is_orderly = _has_ended(folder)
                return Stopped(folder.label, True, "stopped in order" if is_orderly else "ended")
            self._say(f"{folder.label}: not over, cancelling it")
        return self._cancel(folder.job_id, "cancelled")

    def _ends(self, folder: JobFolder, job_id: int, grace_s: float) -> bool:
        """Whether the job ends by itself within `grace_s`."""
        self._watcher.expire()
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if _has_ended(folder):
                return self._is_gone(job_id, LEAVE_TIMEOUT_S)
            if self._watcher.is_over(job_id):  # that asks Slurm seldom
                return True
            time.sleep(POLL_S)
        return False

    def _cancel(self, job_id: int, how: str) -> Stopped:
        self._scancel(str(job_id))
        if self._is_gone(job_id, KILL_TIMEOUT_S):
            return Stopped(str(job_id), True, how)
        return Stopped(str(job_id), False, f"{how}, but Slurm still lists it: squeue -j {job_id}")

    def _scancel(self, *arguments: str) -> None:
        try:
            self._runner(["scancel", *arguments])
        except SlurmError as error:
            if not any(words in str(error) for words in _ALREADY_OVER):
                raise

    def _is_gone(self, job_id: int, limit_s: float) -> bool:
        """Whether Slurm calls all of the job over within `limit_s`."""
        deadline = time.monotonic() + limit_s
        gaps = iter(ASK_AGAIN_S)
        while True:
            self._watcher.expire()
            if self._watcher.is_over(job_id):
                return True
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(next(gaps, ASK_AGAIN_S[-1]), left_s))

    def _stop_local(self, folder: JobFolder, grace_s: float) -> Stopped:
        state = read_state(folder.run).state
        if state is None or not state.pid:
            return Stopped(folder.label, False, "it has not said yet which process it is")
        if state.host != socket.gethostname():
            return Stopped(folder.label, False, f"it runs on {state.host}: stop it there")
        if not _is_ours(state.pid):
            return Stopped(folder.label, True, f"its orchestrator (pid {state.pid}) is gone")
        os.kill(state.pid, signal.SIGTERM)
        deadline = time.monotonic() + max(grace_s, KILL_TIMEOUT_S)
        while time.monotonic() < deadline:
            if _has_ended(folder):
                return Stopped(folder.label, True, "stopped in order")
            time.sleep(POLL_S)
        return Stopped(folder.label, False, f"pid {state.pid} does not end: kill it by hand")


def successors(folder: JobFolder, runs: Path) -> list[int]:
    """Return the jobs that were submitted to take over from this one, the last of them first."""
    if folder.job_id is None:
        return []
    chain: list[int] = []
    known = records.read_all(runs)
    following = _following(folder.job_id, known)
    while following:
        chain += following
        following = [job for before in following for job in _following(before, known)]
    return chain[::-1]


def _following(job_id: int, known: Iterable[Record]) -> list[int]:
    return [record.job_id for record in known if record.predecessor == job_id]


def _is_live(view: JobView) -> bool:
    """Whether Slurm lists a component that is not over."""
    return any(not is_over(part.state) for part in view.components)


def _has_ended(folder: JobFolder) -> bool:
    """Whether the run itself has written that it is over."""
    state = read_state(folder.run).state
    return state is not None and state.state in ("DONE", "FAILED")


def _is_ours(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"rdma_kv_cache" in command or b"rdma-kv" in command
