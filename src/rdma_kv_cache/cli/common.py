# SPDX-License-Identifier: Apache-2.0
"""What several commands share: the job's options, its run folder, clear errors, signals."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from rdma_kv_cache.cluster.launch import Cluster
    from rdma_kv_cache.cluster.run_dir import RunDir
    from rdma_kv_cache.config import JobConfig

    _F = TypeVar("_F", bound=Callable[..., Any])

EXIT_BAD_INPUT = 2
EXIT_TIME_LIMIT = 128 + signal.SIGUSR1
STOP_TIMEOUT_S = 60.0
# The orchestrator has the same start timeout and knows the reason better: let it speak first.
START_MARGIN_S = 30.0


class InputError(click.ClickException):
    """Bad input: one message, no traceback, exit code 2."""

    exit_code = EXIT_BAD_INPUT


def job_options(*, required: bool) -> Callable[[_F], _F]:
    """Return a decorator that adds --config, --set and --run-dir."""

    def add(command: _F) -> _F:
        for option in reversed(
            (
                click.option(
                    "--config",
                    "job_file",
                    type=click.Path(path_type=Path),
                    required=required,
                    help="Job file (YAML); its keys: rdma-kv config --keys.",
                ),
                set_option,
                click.option(
                    "--run-dir",
                    type=click.Path(path_type=Path),
                    help="Folder for state, key and logs.  [default: runs/JOB-TIME]",
                ),
            )
        ):
            command = option(command)
        return command

    return add


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a key of the job file, e.g. rdma.queue_depth=256. Repeatable.",
)


def load(job_file: Path, overrides: Sequence[str]) -> JobConfig:
    """Load the job file; what is wrong with it becomes an InputError."""
    from rdma_kv_cache.config import JobError, load_job

    try:
        return load_job(job_file, os.environ, overrides)
    except JobError as error:
        raise InputError(str(error)) from error


@contextmanager
def running_cluster(job_file: Path, job: JobConfig, run_dir: Path | None) -> Iterator[Cluster]:
    """Start the job's ranks here, say each stage, and yield the cluster when it serves."""
    from rdma_kv_cache.cluster.launch import Cluster
    from rdma_kv_cache.cluster.launcher import ClusterError
    from rdma_kv_cache.cluster.run_dir import RunDir
    from rdma_kv_cache.config import JobError

    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = RunDir(run_dir or Path("runs") / f"{job_file.stem}-{stamp}-{os.getpid()}")
    copy = write_job(folder, job)
    say(f"Run folder {folder.path}")
    started = time.monotonic()
    try:
        with Cluster(copy, job, folder) as cluster:
            cluster.wait_ready(
                job.orchestrator.engine_start_timeout_s + START_MARGIN_S,
                on_stage=lambda stage: say(f"[{time.monotonic() - started:5.1f} s] {stage}"),
            )
            yield cluster
    except KeyboardInterrupt as interrupt:
        raise SystemExit(128 + signal.SIGINT) from interrupt
    except JobError as error:
        raise InputError(str(error)) from error
    except ClusterError as error:
        raise click.ClickException(f"{error}\nLogs: {folder.logs}") from error


def write_job(folder: RunDir, job: JobConfig) -> Path:
    """Write the job after all overrides, so that every rank reads the same one.

    It may hold the API key: only the user may read it.
    """
    from rdma_kv_cache.config import dump_job

    copy = folder.path / "job.yaml"
    try:
        folder.create()
        copy.unlink(missing_ok=True)
        copy.touch(mode=0o600)
        copy.write_text(dump_job(job), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the run folder {folder.path}: {error.strerror}.") from error
    return copy


def say(text: str) -> None:
    """Tell the user something that is not the command's result."""
    click.echo(text, err=True)


class Terminated(SystemExit):
    """A signal to end, as an exception, so that what was started is stopped on the way out."""


def raise_on_sigterm() -> None:
    """From now on SIGTERM raises Terminated in the main thread, as Ctrl-C raises.

    So does SIGUSR1, Slurm's warning that the time limit is near.
    """

    def handle(number: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated(128 + number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handle)
