# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv logs`: what a job's ranks say."""

from __future__ import annotations

import json
import time
from pathlib import Path  # noqa: TC003 (click calls it)
from typing import TYPE_CHECKING

import click

from rdma_kv_cache.cli import common, lookup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rdma_kv_cache.cluster.run_dir import RunDir
    from rdma_kv_cache.config import JobConfig
    from rdma_kv_cache.watch.folders import JobFolder
    from rdma_kv_cache.watch.tail import LogFile

POLL_S = 0.5
# The last lines of a rank may come after its run has written its end.
QUIET_S = 2.0
LAUNCHER = "launcher"
SLURM = "slurm"


@click.command(short_help="Show a job's logs, all or one engine's.")
@click.argument("job")
@click.argument("rank", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended, or Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Last lines of each file.",
)
@click.option("--attempt", type=click.IntRange(min=0), help="Of this attempt.  [default: latest]")
@lookup.json_option
@lookup.runs_option
def logs(
    job: str,
    rank: str | None,
    follow: bool,
    lines: int,
    attempt: int | None,
    as_json: bool,
    runs: Path | None,
) -> None:
    """Show the last lines of a job's logs.

    RANK is a rank's number (0 is the orchestrator), an engine's name (decode-0), launcher (all
    ranks' own lines) or slurm (the batch script); without it all files are shown. With --json
    each line is an object with the keys log, file and line.

    Exit code: 0; 1 if there are no logs yet; 2 for an unknown job, rank or attempt.

    \b
    Example:
      rdma-kv logs 4711
      rdma-kv logs 4711 decode-0 -n 100 --follow
    """
    folder = lookup.find_job(lookup.open_watcher(runs), job)
    run = _attempt(folder, attempt)
    files = _choose(folder, run, rank)
    if not any(file.path.exists() for file in files):
        paths = ", ".join(dict.fromkeys(str(file.path) for file in files))
        raise click.ClickException(f"job {folder.label} has no such log yet: {paths}")
    show = _show_json if as_json else _Headed(len(files) > 1).show
    for file in files:
        show(file, file.last(lines))
    if follow:
        _follow(files, run, show)


def _attempt(folder: JobFolder, number: int | None) -> RunDir:
    if number is None:
        return folder.run
    attempts = folder.attempts()
    if number not in attempts:
        known = ", ".join(map(str, attempts)) or "none"
        raise common.InputError(f"job {folder.label} has no attempt {number}; it has {known}.")
    return attempts[number]


def _choose(folder: JobFolder, run: RunDir, rank: str | None) -> list[LogFile]:
    """Return the files that RANK names. Raises InputError for a name that means nothing."""
    from rdma_kv_cache.watch.tail import LogFile

    launcher = LogFile(LAUNCHER, run.launcher_log)
    slurm = [LogFile(SLURM, folder.slurm_log)] if folder.job_id is not None else []
    job = _job(run)
    if rank is None:
        names = _engines(job) or sorted(
            path.stem for path in run.logs.glob("*.log") if path != run.launcher_log
        )
        engines = [LogFile(name, run.engine_log(name)) for name in names]
        return [file for file in (*slurm, launcher, *engines) if file.path.exists()] or [launcher]
    if rank == LAUNCHER:
        return [launcher]
    if rank == SLURM and slurm:
        return slurm
    names = ["orchestrator", *_engines(job)]
    name = names[int(rank)] if rank.isdigit() and int(rank) < len(names) else rank
    if name in names:
        number = names.index(name)
        files = [LogFile(f"rank {number} ({name})", run.launcher_log, number)]
        return files if number == 0 else [*files, LogFile(name, run.engine_log(name))]
    if rank.isdigit() and job is None:
        return [LogFile(f"rank {rank}", run.launcher_log, int(rank))]
    if run.engine_log(rank).is_file():
        return [LogFile(rank, run.engine_log(rank))]
    known = ", ".join([*names, LAUNCHER, *(file.title for file in slurm)])
    raise common.InputError(f"job {folder.label} has no rank {rank!r}; it has {known}.")


def _job(run: RunDir) -> JobConfig | None:
    from rdma_kv_cache.config import JobError, load_job

    try:
        return load_job(run.path / "job.yaml", env={})
    except JobError:
        return None


def _engines(job: JobConfig | None) -> list[str]:
    """Return the engines' names in rank order; [] if the job is not known."""
    return [] if job is None else [*job.engine_names("prefill"), *job.engine_names("decode")]


def _show_json(file: LogFile, lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(json.dumps({"log": file.title, "file": str(file.path), "line": line}))


class _Headed:
    """Prints lines, of several files each under a line that names it, as `tail` does."""

    def __init__(self, is_headed: bool) -> None:
        self._is_headed = is_headed
        self._last: LogFile | None = None

    def show(self, file: LogFile, lines: Iterable[str]) -> None:
        """Print the lines of `file`."""
        for line in lines:
            if self._is_headed and file is not self._last:
                click.echo(f"==> {file.title}: {file.path} <==")
                self._last = file
            click.echo(line)


def _follow(
    files: Sequence[LogFile], run: RunDir, show: Callable[[LogFile, Iterable[str]], None]
) -> None:
    from rdma_kv_cache.watch.folders import read_state

    quiet_since = time.monotonic()
    try:
        while True:
            for file in files:
                if added := list(file.more()):
                    quiet_since = time.monotonic()
                    show(file, added)
            if time.monotonic() - quiet_since > QUIET_S:
                state = read_state(run).state
                if state is not None and state.state in ("FAILED", "DONE"):
                    return
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return
