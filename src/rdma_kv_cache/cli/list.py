# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv list`: the jobs and their states."""

from __future__ import annotations

import time
from pathlib import Path  # noqa: TC003 (click calls it)
from typing import TYPE_CHECKING

import click

from rdma_kv_cache.cli import common, lookup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdma_kv_cache.watch.views import JobView

RECENT_S = 24 * 3600.0


@click.command("list", short_help="List jobs and their states.")
@click.option("-a", "--all", "show_all", is_flag=True, help="Also jobs that ended over a day ago.")
@lookup.json_option
@lookup.runs_option
def list_jobs(show_all: bool, as_json: bool, runs: Path | None) -> None:
    """List the jobs of the runs folder: PENDING, STARTING, READY, DRAINING, FAILED or DONE.

    READY is the service's own answer. Slurm is asked once, whatever the number of jobs; without
    Slurm the state files and the services are all there is, and that is said. Runs that were
    started without Slurm are in the folder given by --runs.

    Exit code: 0, also if there is no job; 2 for bad input.

    \b
    Example:
      rdma-kv list
      rdma-kv list --runs runs
      rdma-kv list --json | jq -r '.[] | select(.state == "READY") | .url'
    """
    watcher = lookup.open_watcher(runs)
    folders = watcher.folders()
    oldest = 0.0 if show_all else time.time() - RECENT_S
    views = [
        view
        for folder, view in zip(folders, watcher.look(folders), strict=True)
        if not view.has_ended or folder.last_change() >= oldest
    ]
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(views)).decode())
        return
    if not views:
        common.say(f"No jobs in {watcher.runs} (--runs DIR for another folder, --all for old ones)")
    else:
        _print(views)
    if error := watcher.ask_slurm():
        common.say(f"Slurm could not be asked: {error}. Shown is what the runs themselves say.")


def _print(views: Sequence[JobView]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table("Job", "Name", "Kind", "State", "Nodes", "Time", "Left", "What", box=SIMPLE)
    for view in views:
        nodes = " + ".join(part.nodes or str(part.node_count) for part in view.components)
        table.add_row(
            view.job,
            view.name,
            view.kind,
            view.state if view.verified or view.state != "READY" else "READY?",
            nodes,
            view.elapsed,
            view.time_left,
            view.detail or (lookup.describe(view.batch) if view.batch else view.url),
        )
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        # Into a file or a pager nothing is to be folded.
        console.width = 200
    console.print(table)
    if any(view.state == "READY" and not view.verified for view in views):
        common.say("READY? is what the run wrote; its service could not be asked from here.")
