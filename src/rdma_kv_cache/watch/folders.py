# SPDX-License-Identifier: Apache-2.0
"""The run folders under one runs folder, read as a shared file system shows them: late, or stale.

A Slurm job has `NAME-JOBID/attempt-N/…`, one folder an attempt; a run without Slurm is a run folder
by itself.
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from rdma_kv_cache.cluster.run_dir import RunDir, RunState
from rdma_kv_cache.slurm import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rdma_kv_cache.slurm.records import Record

_T = TypeVar("_T")
_JOB_FOLDER = re.compile(r"(?P<name>.+)-(?P<job_id>\d+)")
_ATTEMPT = re.compile(r"attempt-(\d+)")
# A file replaced on another node: its old handle is stale until the folder is read anew.
_RETRIES_S = (0.05, 0.2, 0.5)


class NoSuchJob(LookupError):
    """No job, or more than one, is meant by what the user typed; the text says what there is."""


@dataclass(frozen=True)
class JobFolder:
    """A job's folder and what was written there when it was submitted."""

    path: Path
    name: str
    job_id: int | None
    """None for a run without Slurm."""
    run: RunDir
    """Of the latest attempt; it need not exist yet."""
    attempt: int | None
    """0 for the first, more after Slurm requeued it; None while there is none, or without Slurm."""
    record: Record | None = None

    @property
    def label(self) -> str:
        """What the user calls it: the job id, or the folder's name without Slurm."""
        return self.path.name if self.job_id is None else str(self.job_id)

    @property
    def kind(self) -> str:
        """serve or batch; "" if nothing says so."""
        return "" if self.record is None else self.record.kind

    @property
    def slurm_log(self) -> Path:
        """What the batch script says, if this is a Slurm job."""
        return self.path.with_name(self.path.name + ".out")

    def last_change(self) -> float:
        """Return when something was last written there, as Unix time; 0 if that is not known."""
        times = [0.0]
        for path in (self.path, self.run.state_file):
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)

    def attempts(self) -> dict[int, RunDir]:
        """Return all attempts by number."""
        return {n: RunDir(self.path / f"attempt-{n}") for n in _attempts(self.path)}


@dataclass(frozen=True)
class Reading:
    """The state file as it could be read."""

    state: RunState | None
    written: float = 0.0
    """When, in seconds since the epoch; 0 without a file."""
    problem: str = ""
    """Why it could not be read."""


def find_folders(runs: Path) -> list[JobFolder]:
    """Return all jobs' folders under `runs`, the latest submitted last; none if it is missing."""
    try:
        entries = sorted(entry for entry in runs.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    found = [folder for entry in entries if (folder := open_folder(entry)) is not None]
    return sorted(found, key=lambda folder: (folder.job_id or 0, folder.path.name))


def open_folder(path: Path) -> JobFolder | None:
    """Return the job whose folder, or one of whose attempts, is `path`; None if it is neither."""
    path = path.absolute()
    if _ATTEMPT.fullmatch(path.name) or path.name == "latest":
        path = path.parent
    record = records.read(path)
    numbers = _attempts(path)
    if record is None and not numbers:
        run = RunDir(path)
        is_run = run.state_file.exists() or run.logs.is_dir()
        return JobFolder(path, path.name, None, run, None) if is_run else None
    attempt = max(numbers, default=None)
    named = _JOB_FOLDER.fullmatch(path.name)
    name, job_id = (named["name"], int(named["job_id"])) if named else (path.name, None)
    return JobFolder(
        path=path,
        name=name if record is None else record.name,
        job_id=job_id if record is None else record.job_id,
        run=RunDir(path / f"attempt-{attempt or 0}"),
        attempt=attempt,
        record=record,
    )


def choose(text: str, folders: Iterable[JobFolder]) -> JobFolder:
    """Return the job that a user means: job id, id of a component, name, or a path to its folder.

    Of several jobs of one name it is the latest. Raises NoSuchJob.
    """
    folders = list(folders)
    leader = text.partition("+")[0]
    if leader.isdigit():
        for folder in folders:
            if folder.job_id == int(leader):
                return folder
    named = [folder for folder in folders if text in (folder.name, folder.path.name)]
    if named:
        return named[-1]
    path = Path(text)
    if path.is_dir() and (found := open_folder(path)) is not None:
        return found
    known = ", ".join(f"{folder.label} ({folder.name})" for folder in folders[-5:])
    raise NoSuchJob(
        f"no job {text!r}; " + (f"the latest are {known}" if known else "there is none")
    )


def read_state(run: RunDir) -> Reading:
    """Read the run's state file; stale handles and half-replaced files are tried again."""
    try:
        state = patiently(run.read_state)
        written = 0.0 if state is None else run.state_file.stat().st_mtime
    except FileNotFoundError:
        return Reading(None)
    except OSError as error:
        return Reading(None, problem=f"{run.state_file}: {error.strerror}")
    except msgspec.MsgspecError as error:
        return Reading(None, problem=f"{run.state_file} is not a state: {error}")
    return Reading(state, written)


def patiently(read: Callable[[], _T]) -> _T:
    """Return what `read` returns; ESTALE and a file that cannot be decoded are tried again.

    Raises what the last try raised.
    """
    for pause_s in _RETRIES_S:
        try:
            return read()
        except msgspec.MsgspecError:
            pass
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        time.sleep(pause_s)
    return read()


def _attempts(path: Path) -> list[int]:
    # By their names: the `latest` link may lag behind on a shared file system.
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError:
        return []
    return sorted(int(found[1]) for name in names if (found := _ATTEMPT.fullmatch(name)))
