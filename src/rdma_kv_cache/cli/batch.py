# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv batch`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdma_kv_cache.cli import common
from rdma_kv_cache.cli.chain import chain_option, open_link, submit_fallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdma_kv_cache.batch import BatchOptions, BatchResult, InputInfo
    from rdma_kv_cache.cluster.run_dir import RunDir

EXIT_ERROR_LINES = 1
EXIT_STOPPED = 3


def _seconds(flag: str, name: str, default: float, text: str) -> Callable[[Any], Any]:
    kind = click.FloatRange(min=0, min_open=True)
    return click.option(flag, name, type=kind, default=default, show_default=True, help=text)


@click.command(short_help="Run a file of prompts: one answer line for each.")
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Answer file."
)
@common.job_options(required=False)
@click.option("--url", help="Use the server at this URL instead of starting a job's engines.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with the server's key, for --url; else $RDMA_KV_API_KEY.",
)
@click.option("--model", help="Model for all lines, instead of what they say.")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    help="Requests in flight at once.",
)
@_seconds("--request-timeout", "request_timeout_s", 600.0, "Longest wait for one answer, s.")
@_seconds(
    "--retry-deadline",
    "retry_deadline_s",
    300.0,
    "How long a request is retried after 429, 5xx or a lost connection, s.",
)
@_seconds(
    "--drain-timeout",
    "drain_timeout_s",
    10.0,
    "Longest wait for requests in flight after Ctrl-C or SIGTERM, s.",
)
@click.option(
    "--restart",
    "--no-resume",
    "restart",
    is_flag=True,
    help="Throw away the results of a run that was stopped, and begin anew.",
)
@chain_option(
    "submit a successor now that starts only if this job ends without having done all: at its time "
    "limit, by preemption, by a lost node. At most so many."
)
def batch(
    prompts: Path,
    out: Path,
    job_file: Path | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    url: str | None,
    api_key_file: Path | None,
    chain: int | None,
    **sending: Any,
) -> None:
    """Run the OpenAI Batch lines of PROMPTS (.jsonl or .jsonl.gz): one answer line for each, in order.

    Either --config (starts the job's engines, here or on the nodes of the Slurm job that this runs
    in, and stops them) or --url (a running server).
    A line that is wrong, or that the server refuses, becomes an error line and stops nothing.
    Finished lines are kept in OUT.progress.jsonl: after a kill the same command continues, and
    lines that failed for a passing reason (429, 5xx, no answer) are tried again.

    \b
    Exit code:
      0    every line has an answer
      1    OUT is complete, and some of its lines are errors (or the engines did not start)
      2    bad input: nothing was run
      3    the server went away, or the disk is full; the same command continues
      130  stopped by Ctrl-C; 143 by SIGTERM, 138 by SIGUSR1 (Slurm: the time limit is near);
           the same command continues

    \b
    Example:
      rdma-kv batch prompts.jsonl -o answers.jsonl --config jobs/configs/smollm2-135m-1p1d-cpu.yaml
      rdma-kv batch prompts.jsonl.gz -o answers.jsonl --url http://127.0.0.1:8000
    """
    from rdma_kv_cache.batch import BatchError, BatchOptions, scan

    if (job_file is None) == (url is None):
        raise click.UsageError("Give either --config (start engines) or --url (a running server).")
    try:
        info = scan(prompts)
        key = _read_key(api_key_file)
        options = BatchOptions(prompts=prompts, out=out, url=url or "", api_key=key, **sending)
        _check_output(options, info)
        fallback = None if chain is None else submit_fallback(open_link(chain, run_dir))
        if job_file is None:
            result = _run(options, info)
        else:
            result = _run_with_engines(options, info, job_file, overrides, run_dir)
        if fallback is not None and not result.stopped and not result.retryable:
            _drop_fallback(fallback)
    except BatchError as error:
        raise common.InputError(str(error)) from error
    _report(result, out)
    raise SystemExit(_exit_code(result))


def _run(options: BatchOptions, info: InputInfo) -> BatchResult:
    from rich.console import Console

    from rdma_kv_cache.batch import run_batch

    return asyncio.run(run_batch(options, info, Console(stderr=True)))


def _run_with_engines(
    options: BatchOptions,
    info: InputInfo,
    job_file: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
) -> BatchResult:
    job = common.load(job_file, overrides)
    common.raise_on_sigterm()
    with common.running_cluster(job_file, job, run_dir) as cluster:
        started = replace(
            options,
            url=cluster.url,
            api_key=cluster.api_key,
            why_gone=lambda: why_gone(cluster.run_dir),
            state_file=cluster.run_dir.batch_file,
        )
        result = _run(started, info)
        # The run had the signal handlers to itself; the engines still have to be stopped.
        common.raise_on_sigterm()
        common.say("Stopping the engines.")
        cluster.stop(common.STOP_TIMEOUT_S)
    return result


def _drop_fallback(job_id: int) -> None:
    from rdma_kv_cache.slurm.chain import drop_fallback
    from rdma_kv_cache.slurm.programs import SlurmError

    try:
        drop_fallback(job_id)
    except SlurmError as error:
        common.say(f"The successor {job_id} is not needed; cancel it: {error}")


def why_gone(run_dir: RunDir) -> str:
    """Return why the run's orchestrator will not answer any more; "" while it may."""
    state = run_dir.read_state()
    if state is None:
        return ""
    if state.state in ("FAILED", "DONE"):
        return f"the run has ended: {state.reason or state.stage}"
    if not Path(f"/proc/{state.pid}").exists():
        return f"the orchestrator (pid {state.pid}) has died; see {run_dir.logs}"
    return ""


def _check_output(options: BatchOptions, info: InputInfo) -> None:
    """Refuse an output that cannot be written or continued, before engines start."""
    from rdma_kv_cache.batch import BatchError, check_input

    out = options.out
    if out.is_dir():
        raise BatchError(f"{out}: is a folder. Give -o a file name.")
    if out.exists() and out.samefile(options.prompts):
        raise BatchError(f"{out}: is the prompt file itself. Choose another -o.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BatchError(f"{out.parent}: cannot make the folder: {error.strerror}.") from error
    if not os.access(out.parent, os.W_OK):
        raise BatchError(f"{out.parent}: no permission to write there. Choose another -o.")
    if not options.restart:
        check_input(out, info.sha256)


def _read_key(api_key_file: Path | None) -> str | None:
    if api_key_file is None:
        return os.environ.get("RDMA_KV_API_KEY") or None
    try:
        return api_key_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise common.InputError(f"{api_key_file}: cannot read: {error.strerror}.") from error


def _report(result: BatchResult, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in result.rows():
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
    if result.stopped:
        common.say(
            f"Not finished: {result.stopped}. {result.ok + result.failed} of {result.total} lines "
            "are done; run the same command to continue."
        )
        return
    if result.failed:
        common.say(
            f"{result.failed} of {result.total} lines are errors; see their error field or "
            "response.status_code."
        )
    if result.retryable:
        common.say(
            f"{result.retryable} of them failed for a reason that may pass; run the same command "
            "to try only those again."
        )
    click.echo(f"Answers: {out}")


def _exit_code(result: BatchResult) -> int:
    if result.signal:
        return 128 + result.signal
    if result.stopped:
        return EXIT_STOPPED
    return EXIT_ERROR_LINES if result.failed else 0
