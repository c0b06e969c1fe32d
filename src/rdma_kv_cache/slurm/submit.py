# SPDX-License-Identifier: Apache-2.0
"""Hands a job to Slurm and keeps a record of it."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rdma_kv_cache.slurm import records
from rdma_kv_cache.slurm.environment import outside
from rdma_kv_cache.slurm.programs import SlurmError, run
from rdma_kv_cache.slurm.script import render

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rdma_kv_cache.slurm.records import Record
    from rdma_kv_cache.slurm.script import Submission

_PARSABLE = re.compile(r"^([0-9]+)(?:;.*)?$", re.MULTILINE)


def has_submitit() -> bool:
    """Whether submitit is installed here; it is not imported."""
    return importlib.util.find_spec("submitit") is not None


def own_program() -> tuple[str, ...]:
    """Return the command line of this installation's rdma-kv, for nodes that see the same files."""
    beside = Path(sys.executable).parent / "rdma-kv"
    if beside.is_file():
        return (str(beside),)
    return (sys.executable, "-m", "rdma_kv_cache.cli")


def submit(
    submission: Submission,
    job_file: Path,
    *,
    predecessor: int | None = None,
    output: str = "",
    function: Callable[[], int] | None = None,
    env: Mapping[str, str] = os.environ,
) -> Record:
    """Submit the job and write its record into its folder.

    `job_file` and `output` (of a batch job) are for the record. With a `function` submitit submits
    the job and runs it; else plain sbatch, and the program. From inside a job its variables are
    kept from the new one. Raises JobError, SlurmError, or OSError for the runs folder.
    """
    require_sbatch()
    submission.runs.mkdir(mode=0o700, parents=True, exist_ok=True)
    script = render(submission)
    if function is None:
        job_id = _sbatch(submission, script, env)
    else:
        job_id = _submitit(submission, function, env)
    folder = records.job_folder(submission.runs, submission.name, job_id)
    record = records.Record(
        job_id=job_id,
        name=submission.name,
        kind=submission.kind,
        folder=str(folder),
        job_file=str(job_file.absolute()),
        submitted=time.time(),
        via="sbatch" if function is None else "submitit",
        predecessor=predecessor,
        output=output,
    )
    records.write(record)
    # Also of a job through submitit the plain one: it can be submitted again, without a pickle.
    (folder / records.SCRIPT_FILE).write_text(script, encoding="utf-8")
    return record


def for_submitit(submission: Submission) -> Submission:
    """Return the submission with submitit's command in place of the program's."""
    from rdma_kv_cache.slurm import submitit_executor

    return replace(submission, command=submitit_executor.command(submission))


def require_sbatch() -> None:
    """Raise SlurmError, saying what works without it, if there is no sbatch."""
    if shutil.which("sbatch") is None:
        path = os.environ.get("PATH", os.defpath)
        raise SlurmError(
            f"no sbatch on PATH ({path}): Slurm's programs are on a cluster's login nodes, or in a "
            "module. Without Slurm these work: rdma-kv render (the script), rdma-kv serve and "
            "rdma-kv batch (on this machine)"
        )


def leaving(env: Mapping[str, str]) -> list[str]:
    """Return the head of a command line that runs the rest outside of the job of `env`."""
    kept = outside(env)
    return ["env", *(f"--unset={name}" for name in sorted(env) if name not in kept)]


def _submitit(submission: Submission, function: Callable[[], int], env: Mapping[str, str]) -> int:
    from submitit.core.utils import FailedSubmissionError

    from rdma_kv_cache.slurm import submitit_executor

    script = render(for_submitit(submission))
    try:
        return int(submitit_executor.submit(submission, script, function, env).job_id)
    except FailedSubmissionError as error:
        raise SlurmError(f"sbatch: {error}") from error


def _sbatch(submission: Submission, script: str, env: Mapping[str, str]) -> int:
    # From a file, not from stdin: sites' submit filters want one.
    path = submission.runs / f".{submission.name}-{secrets.token_hex(4)}.sh"
    try:
        path.write_text(script, encoding="utf-8")
        said = run(["sbatch", "--parsable", str(path)], outside(env))
    finally:
        path.unlink(missing_ok=True)
    return job_id_of(said)


def job_id_of(said: str) -> int:
    """Return the job id that `sbatch --parsable` printed. Raises SlurmError."""
    match = _PARSABLE.search(said)
    if match is None:
        raise SlurmError(f"sbatch printed {said.strip()!r}, which is no job id")
    return int(match[1])
