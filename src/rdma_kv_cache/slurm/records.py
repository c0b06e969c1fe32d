# SPDX-License-Identifier: Apache-2.0
"""What was submitted: the folder of a job under the runs folder, and the record in it.

RUNS/NAME-JOBID.out                   what the batch script says (Slurm opens it)
RUNS/NAME-JOBID/submission.json       the record
               /script.sh             the script, as submitted
               /attempt-N/            the run folder; N counts Slurm's own requeues
               /latest                link to the newest attempt
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from rdma_kv_cache.config.replace_file import replace_file

Kind = Literal["serve", "batch"]

RECORD_FILE = "submission.json"
SCRIPT_FILE = "script.sh"
LATEST = "latest"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One submitted job."""

    job_id: int
    """Of the leader."""
    name: str
    kind: Kind
    folder: str
    """The job's folder; its `latest` is the run folder."""
    job_file: str
    """The job file that it was made from."""
    submitted: float
    """Unix time."""
    via: str = "sbatch"
    """What submitted it: sbatch or submitit."""
    predecessor: int | None = None
    """The job that this one takes over from."""
    output: str = ""
    """Of a batch job: its answer file."""

    @property
    def path(self) -> Path:
        """The job's folder."""
        return Path(self.folder)

    @property
    def run_dir(self) -> Path:
        """The newest run folder; a dangling path before the job has started."""
        return self.path / LATEST


def job_folder(runs: Path, name: str, job_id: int) -> Path:
    """Return the folder of a job."""
    return runs / f"{name}-{job_id}"


def write(record: Record) -> None:
    """Write the record into the job's folder, which is made if need be. Raises OSError."""
    record.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(record)) + b"\n"
    replace_file(record.path / RECORD_FILE, data)


def read(folder: Path) -> Record | None:
    """Return the record in the job's folder `folder`; None if there is none that can be read.

    A newer version's record, or a file that is half gone, must not hide all other jobs.
    """
    try:
        return msgspec.json.decode((folder / RECORD_FILE).read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError):
        return None


def read_all(runs: Path) -> list[Record]:
    """Return all records under the runs folder, the oldest job first."""
    try:
        folders = [entry.path for entry in os.scandir(runs) if entry.is_dir()]
    except OSError:
        return []
    records = [record for folder in folders if (record := read(Path(folder))) is not None]
    return sorted(records, key=lambda record: (record.submitted, record.job_id))
