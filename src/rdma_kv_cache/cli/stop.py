# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv stop`: end jobs in order."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 (click calls it)
from typing import TYPE_CHECKING

import click

from rdma_kv_cache.cli import common, lookup

if TYPE_CHECKING:
    from rdma_kv_cache.watch.folders import JobFolder
    from rdma_kv_cache.watch.stop import Stopped
    from rdma_kv_cache.watch.watcher import Watcher

# A little more than `serve` itself waits for requests in flight and for its engines.
GRACE_S = common.STOP_TIMEOUT_S + 15.0
EXIT_NOT_STOPPED = 1


@click.command(short_help="End jobs: requests in flight are answered first.")
@click.argument("jobs", metavar="[JOB]...", nargs=-1)
@click.option(
    "--now", is_flag=True, help="Cancel at once: Slurm kills what is left after KillWait."
)
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    default=GRACE_S,
    show_default=True,
    metavar="SECONDS",
    help="How long a job may take to stop in order before it is cancelled.",
)
@click.option(
    "--only", is_flag=True, help="Leave the jobs alone that were submitted to take over from JOB."
)
@lookup.json_option
@lookup.runs_option
def stop(
    jobs: tuple[str, ...], now: bool, grace_s: float, only: bool, as_json: bool, runs: Path | None
) -> None:
    """End each JOB (id, name or run folder), and the jobs that would take over from it.

    A service answers what is in flight, a batch notes what is done; what has not ended after
    --grace is cancelled (scancel). A job that still waits is cancelled at once. JOB may be left
    out if only one job has not ended.

    Exit code: 0 if all have ended; 1 if one has not or Slurm cannot be asked; 2 for an unknown job.

    \b
    Example:
      rdma-kv stop 4711
      rdma-kv stop 4711 4712 --now
    """
    from rdma_kv_cache.slurm.programs import SlurmError
    from rdma_kv_cache.watch.stop import Stopper

    watcher = lookup.open_watcher(runs)
    folders = _with_successors(watcher, jobs, only)
    stopper = Stopper(watcher, say=common.say)
    results: list[Stopped] = []
    for folder in folders:
        try:
            result = stopper.stop(folder, 0.0 if now else grace_s)
        except SlurmError as error:
            raise click.ClickException(f"job {folder.label} was not stopped: {error}") from error
        results.append(result)
        if not as_json:
            click.echo(f"{result.job}: {result.how}")
    if as_json:
        content = [{"job": r.job, "is_over": r.is_over, "how": r.how} for r in results]
        click.echo(json.dumps(content, indent=2))
    if not all(result.is_over for result in results):
        raise SystemExit(EXIT_NOT_STOPPED)


def _with_successors(watcher: Watcher, jobs: tuple[str, ...], only: bool) -> list[JobFolder]:
    """Return the jobs meant; each one's successors before it, or they would start at its end."""
    from rdma_kv_cache.watch.stop import successors

    chosen = [lookup.find_job(watcher, text) for text in jobs or (None,)]
    ordered: dict[Path, JobFolder] = {}
    for folder in chosen:
        for job_id in [] if only else successors(folder, watcher.runs):
            successor = lookup.find_job(watcher, str(job_id))
            ordered.setdefault(successor.path, successor)
        ordered.setdefault(folder.path, folder)
    return list(ordered.values())
