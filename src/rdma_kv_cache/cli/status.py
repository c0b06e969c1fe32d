# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv status`: all there is to know of one job."""

from __future__ import annotations

import time
from pathlib import Path  # noqa: TC003 (click calls it)
from typing import TYPE_CHECKING

import click

from rdma_kv_cache.cli import common, lookup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, Group, RenderableType
    from rich.table import Table

    from rdma_kv_cache.watch.folders import JobFolder
    from rdma_kv_cache.watch.views import EngineView, JobView
    from rdma_kv_cache.watch.watcher import Watcher

# The services are asked this often, Slurm at most once in ten seconds.
REFRESH_S = 2.0
EXIT_NOT_READY = 1


@click.command(short_help="Show a job's state, URL, engines and load.")
@click.argument("job", required=False)
@click.option("-w", "--watch", is_flag=True, help="Go on until the job has ended, or Ctrl-C.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="First wait until the job is READY or has ended, at most this long.",
)
@lookup.json_option
@lookup.runs_option
def status(
    job: str | None, watch: bool, wait_s: float | None, as_json: bool, runs: Path | None
) -> None:
    """Show a job: state, URL, tunnel, key file, engines by node, requests and tokens/s.

    Of a batch also how many prompts are answered, by earlier jobs of its chain too, and how long the
    rest takes at this job's rate.

    JOB is a job id, a job's name or its run folder; it may be left out if only one job has not
    ended. With --watch --json each line is one JSON object; into a pipe --watch alone prints a
    line for each change.

    Exit code: 0; 1 with --wait if the job did not become READY (or DONE); 2 for an unknown job.

    \b
    Example:
      rdma-kv status 4711
      rdma-kv status 4711 --watch
      rdma-kv status 4711 --wait 900 && curl -s $(rdma-kv status 4711 --json | jq -r .url)/ready
    """
    watcher = lookup.open_watcher(runs)
    folder = lookup.find_job(watcher, job)
    view = _look(watcher, folder, sampled=not watch)
    if wait_s is not None:
        view = _wait(watcher, folder, view, wait_s)
    if watch:
        _watch(_views(watcher, folder, view), as_json)
    elif as_json:
        click.echo(_json(view, indent=2))
    else:
        _console().print(_render(view))
    if wait_s is not None and view.state not in ("READY", "DONE"):
        raise SystemExit(EXIT_NOT_READY)


def _look(watcher: Watcher, folder: JobFolder, *, sampled: bool = False) -> JobView:
    from rdma_kv_cache.watch.folders import open_folder
    from rdma_kv_cache.watch.watcher import SAMPLE_S

    # A requeued job goes on in another attempt.
    folder = open_folder(folder.path) or folder
    (view,) = watcher.look([folder], SAMPLE_S if sampled else 0.0)
    return view


def _wait(watcher: Watcher, folder: JobFolder, view: JobView, limit_s: float) -> JobView:
    """Wait until the job is READY or has ended, and say each stage once."""
    deadline = time.monotonic() + limit_s
    said = ""
    while True:
        stage = f"{view.state} {view.detail}".strip()
        if stage != said:
            common.say(f"{view.job}: {stage}")
            said = stage
        left_s = deadline - time.monotonic()
        if view.state == "READY" or view.has_ended or left_s <= 0:
            return view
        time.sleep(min(REFRESH_S, left_s))
        view = _look(watcher, folder)


def _views(watcher: Watcher, folder: JobFolder, view: JobView) -> Iterator[JobView]:
    """Yield the job's state again and again until it has ended."""
    while True:
        yield view
        if view.has_ended:
            return
        time.sleep(REFRESH_S)
        view = _look(watcher, folder)


def _watch(views: Iterator[JobView], as_json: bool) -> None:
    from rich.live import Live

    try:
        if as_json:
            for view in views:
                click.echo(_json(view))
            return
        console = _console()
        if not console.is_terminal:
            _say_changes(views)
            return
        with Live(console=console, auto_refresh=False) as live:
            for view in views:
                live.update(_render(view), refresh=True)
    except KeyboardInterrupt:
        pass


def _say_changes(views: Iterator[JobView]) -> None:
    """For a file or a pipe: a line for each change, not a picture every two seconds."""
    said = ""
    for view in views:
        line = " ".join([view.state, view.detail or view.url, *view.notes])
        if line != said:
            click.echo(f"{time.strftime('%H:%M:%S')} {line}")
            said = line


def _json(view: JobView, indent: int = -1) -> str:
    import msgspec

    # A negative indent is msgspec's word for one line.
    return msgspec.json.format(msgspec.json.encode(view), indent=indent).decode()


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        # Into a file or a pager nothing is to be folded.
        console.width = 200
    return console


def _render(view: JobView) -> Group:
    from rich.console import Group
    from rich.table import Table

    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(no_wrap=True)
    # A line to paste must stay one line.
    rows.add_column(overflow="ignore", no_wrap=True)
    for name, text in _rows(view):
        if text:
            rows.add_row(name, text)
    parts: list[RenderableType] = [rows]
    if view.engines:
        parts.append(_engine_table(view.engines))
    parts += [f"Note: {note}" for note in view.notes]
    return Group(*parts)


def _rows(view: JobView) -> Iterator[tuple[str, str]]:
    yield "Job", " ".join(filter(None, (view.job, view.name, view.kind)))
    yield "State", f"{view.state}{': ' if view.detail else ''}{view.detail}"
    for part in view.components:
        nodes = part.nodes or f"{part.node_count} nodes"
        yield f"Component {part.offset}", f"{part.state} {nodes}"
    yield "Partition", view.partition
    yield "Submitted", view.submitted.replace("T", " ")
    yield "Runs for", view.elapsed + (f", {view.time_left} left" if view.time_left else "")
    yield "Succeeds", "" if view.follows is None else f"job {view.follows}"
    yield "URL", view.url
    yield "Tunnel", view.tunnel
    yield "Key file", view.api_key_file
    yield "Run folder", view.run_dir
    yield "Job file", view.job_file
    yield "Answers", view.output
    yield "Prompts", "" if view.batch is None else lookup.describe(view.batch)
    counts = [f"{count} {name}" for name, count in view.requests.items() if count is not None]
    yield "Requests", ", ".join(counts)
    yield "Tokens/s", "" if view.tokens_per_s is None else f"{view.tokens_per_s:.1f}"


def _engine_table(engines: list[EngineView]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for name in ("Engine", "Role", "Node", "State", "GPUs", "NIC", "Transport"):
        table.add_column(name)
    for name in ("Running", "Waiting", "KV cache", "Restarts"):
        table.add_column(name, justify="right")
    for engine in engines:
        used = engine.kv_cache_used
        table.add_row(
            engine.name,
            engine.role,
            engine.host,
            engine.state,
            ",".join(engine.gpus),
            ",".join(engine.nics),
            ",".join(sorted({path.backend for path in engine.paths})) or engine.transport,
            "" if engine.running is None else str(engine.running),
            "" if engine.waiting is None else str(engine.waiting),
            "" if used is None else f"{used:.0%}",
            str(engine.restarts),
        )
    return table
