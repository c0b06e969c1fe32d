# SPDX-License-Identifier: Apache-2.0
"""Jobs through submitit, which has no heterogeneous ones: an executor with our batch script.

To submitit a job is one task, its batch script: that runs the pickled function, which returns when
the job is over. The ranks, on whatever nodes, are the function's business. Needs submitit
(`pip install 'rdma-kv-cache[slurm]'`), and accounting for a state other than UNKNOWN.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit.slurm import slurm

from rdma_kv_cache.slurm import time_limit
from rdma_kv_cache.slurm.script import RUN, RUN_VARIABLE
from rdma_kv_cache.slurm.submit import leaving

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rdma_kv_cache.slurm.records import Record
    from rdma_kv_cache.slurm.script import Submission

POLL_S = 10.0


class HetWatcher(slurm.SlurmInfoWatcher):
    """Knows the components of a job: sacct calls them `6+0`, `6+1`, and submitit asks for `6`."""

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Return what sacct says of each job.

        A heterogeneous job's state is its leader's, whose end is the job's end; `Components` has
        the states of all. For its first seconds accounting knows the leader alone, as `6`.
        """
        info: dict[str, dict[str, str]] = super().read_info(string)
        states: dict[str, dict[int, str]] = {}
        for key in [key for key in info if "+" in key]:
            leader, _, offset = key.partition("+")
            states.setdefault(leader, {})[int(offset)] = info[key]["State"]
        for leader, by_offset in states.items():
            if 0 in by_offset:
                joined = ",".join(by_offset[offset] for offset in sorted(by_offset))
                info[leader] = {**info[f"{leader}+0"], "JobID": leader, "Components": joined}
        return info


class HetJob(slurm.SlurmJob[Any]):
    """A job whose components may be several."""

    watcher = HetWatcher(delay_s=60)

    @property
    def component_states(self) -> list[str]:
        """Slurm's states of the components, in order; one of a plain job."""
        info = self.get_info()
        return (info.get("Components") or info.get("State") or "UNKNOWN").split(",")


class HetExecutor(slurm.SlurmExecutor):
    """Submits `script` in place of submitit's own. No arrays: Slurm has none of these jobs."""

    job_class = HetJob

    def __init__(self, folder: Path, script: str, env: Mapping[str, str]) -> None:
        super().__init__(folder)
        self._script = script
        self._env = env

    def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
        if len(delayed_submissions) != 1:
            raise ValueError("heterogeneous jobs cannot be submitted as an array")
        jobs: list[Any] = super()._internal_process_submissions(delayed_submissions)
        return jobs

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [*leaving(self._env), "sbatch", str(submission_file_path)]

    def _num_tasks(self) -> int:
        return 1

    @staticmethod
    def _set_job_permissions(folder: Path) -> None:
        folder.chmod(0o700)


def command(submission: Submission) -> str:
    """Return the line of shell that ends the script: submitit runs the pickled function."""
    python = [sys.executable, "-u", "-m", "submitit.core._submit", str(_folder(submission))]
    return f"env SUBMITIT_EXECUTOR=slurm {RUN_VARIABLE}={RUN} \\\n  {shlex.join(python)}"


def submit(
    submission: Submission,
    script: str,
    function: Callable[[], int],
    env: Mapping[str, str] = os.environ,
) -> HetJob:
    """Submit `script`, whose last line is `command(submission)`; it runs `function`."""
    executor = HetExecutor(_folder(submission), script, env)
    if submission.job.slurm.time is not None:
        executor.update_parameters(time=-(-time_limit.seconds(submission.job.slurm.time) // 60))
    job: HetJob = executor.submit(function)
    for log in (job.paths.stdout, job.paths.stderr):
        log.symlink_to(Path("..", f"{submission.name}-{job.job_id}.out"))
    for link in submission.runs.glob(".submission_file_*.sh"):
        # submitit leaves one a job, to the script that it has moved into the job's folder.
        if link.is_symlink() and link.resolve().parent == job.paths.folder.resolve():
            link.unlink()
    return job


def job_of(record: Record) -> HetJob:
    """Return submitit's handle of a job that was submitted through it."""
    return HetJob(
        folder=f"{record.folder.rpartition('-')[0]}-%j", job_id=str(record.job_id), tasks=[0]
    )


def follow(job: HetJob, say: Callable[[str], None], poll_s: float = POLL_S) -> int:
    """Say each change of the components' states until the job is over; end it on Ctrl-C.

    Returns the exit code: 0 if its function returned, else 1, and 130 after Ctrl-C.
    """
    said = ""
    try:
        while not job.done():
            states = ", ".join(job.component_states)
            if states != said:
                said = states
                say(f"job {job.job_id}: {states}")
            time.sleep(poll_s)
    except KeyboardInterrupt:
        job.cancel()
        say(f"job {job.job_id}: cancelled")
        return 128 + signal.SIGINT
    error = job.exception()
    say(f"job {job.job_id}: " + ("ended well" if error is None else f"failed\n{error}"))
    return 0 if error is None else 1


def _folder(submission: Submission) -> Path:
    return submission.runs / f"{submission.name}-%j"
