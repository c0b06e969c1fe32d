# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv adopt`: makes the run folder of the Slurm job that it runs in; for batch scripts."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rdma_kv_cache.cli import common

if TYPE_CHECKING:
    from rdma_kv_cache.slurm.records import Kind

STANDARD_ERROR = 2


@click.command(hidden=True)
@click.argument("kind", type=click.Choice(["serve", "batch"]))
@click.argument("job_file", type=click.Path(path_type=Path))
def adopt(kind: Kind, job_file: Path) -> None:
    """Make the run folder of the Slurm job that this runs in, and print its path.

    Also the record that `rdma-kv list` and `status` read, which `rdma-kv submit` writes for its
    jobs. Exit code: 0, 1 if the folder cannot be made, 2 outside of a job or for a bad site file.

    \b
    Example:
      run=$(rdma-kv adopt serve job.yaml)
      exec rdma-kv serve --config job.yaml --run-dir "$run"
    """
    from rdma_kv_cache.config import JobError
    from rdma_kv_cache.slurm import records
    from rdma_kv_cache.slurm.environment import allocation
    from rdma_kv_cache.slurm.script import job_name
    from rdma_kv_cache.slurm.site import load_site

    try:
        here = allocation(os.environ)
        runs = load_site(os.environ).runs_path
    except (JobError, ValueError) as error:
        raise common.InputError(str(error)) from error
    if here is None:
        raise common.InputError("SLURM_JOB_ID is not set: this is for batch scripts of Slurm")
    name = job_name(here.job_name or job_file.stem)
    folder = records.job_folder(runs, name, here.job_id)
    attempt = folder / f"attempt-{here.restart_count}"
    record = records.Record(
        job_id=here.job_id,
        name=name,
        kind=kind,
        folder=str(folder),
        job_file=str(job_file.absolute()),
        submitted=time.time(),
    )
    try:
        if records.read(folder) is None:
            records.write(record)
        attempt.mkdir(mode=0o700, exist_ok=True)
        _link(folder / records.LATEST, Path(attempt.name))
        _link_output(folder.with_name(folder.name + ".out"))
    except OSError as error:
        raise click.ClickException(f"{error.filename or folder}: {error.strerror}") from error
    click.echo(str(attempt))


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _link_output(link: Path) -> None:
    """Link to what Slurm has opened for the script, wherever that is."""
    output = Path(f"/proc/self/fd/{STANDARD_ERROR}").resolve()
    if output.is_file() and output != link:
        _link(link, output)
