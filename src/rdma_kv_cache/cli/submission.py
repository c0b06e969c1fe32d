# SPDX-License-Identifier: Apache-2.0
"""What `submit` and `render` share: their options, and the submission that these make."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rdma_kv_cache.cli import common, lookup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rdma_kv_cache.slurm.records import Kind, Record
    from rdma_kv_cache.slurm.script import Submission

    _F = TypeVar("_F", bound=Callable[..., Any])

PASS_ON = {"ignore_unknown_options": True}
"""Context settings of a command whose further options are those of `serve` or `batch`."""


@dataclass(frozen=True)
class Request:
    """What the user asks to be submitted."""

    submission: Submission
    job_file: Path
    via_submitit: bool
    output: str = ""


def submission_options(command: _F) -> _F:
    """Add the options that say what is submitted, and how."""
    for option in reversed(
        (
            click.option(
                "--config",
                "job_file",
                type=click.Path(path_type=Path),
                required=True,
                help="Job file (YAML); its keys: rdma-kv config --keys.",
            ),
            common.set_option,
            click.option("--name", help="Name of the job.  [default: the job file's]"),
            click.option(
                "--option",
                "sbatch_options",
                multiple=True,
                metavar="--NAME=VALUE",
                help="Option of sbatch for this job, e.g. --dependency=afterok:7. Repeatable.",
            ),
            click.option(
                "--submitit/--sbatch",
                "via_submitit",
                default=None,
                help="What submits and runs the job.  [default: submitit if it is installed]",
            ),
            lookup.runs_option,
            click.argument("further", nargs=-1, type=click.UNPROCESSED),
        )
    ):
        command = option(command)
    return command


def make_request(
    kind: Kind,
    arguments: Sequence[str],
    *,
    job_file: Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
    sbatch_options: Sequence[str] = (),
    via_submitit: bool | None = None,
    runs: Path | None = None,
    output: str = "",
) -> Request:
    """Return the request that these options make; what is wrong becomes an InputError.

    `arguments` are those of the command that the job runs; they are checked here, before the job
    waits in a queue.
    """
    from rdma_kv_cache.config import JobError
    from rdma_kv_cache.slurm.script import Submission, job_name
    from rdma_kv_cache.slurm.site import load_site
    from rdma_kv_cache.slurm.submit import has_submitit, own_program

    _check_arguments(kind, arguments)
    job = common.load(job_file, overrides)
    for option in sbatch_options:
        if not option.startswith("--"):
            raise common.InputError(f"--option {option}: say --option=--NAME=VALUE")
    if any(word.partition("=")[0] == "--chain" for word in arguments):
        # A job of a chain submits its own script again; submitit's runs what was pickled for one job.
        if via_submitit:
            raise common.InputError("--chain and --submitit exclude each other: use --sbatch")
        via_submitit = False
    if via_submitit is None:
        via_submitit = has_submitit()
    elif via_submitit and not has_submitit():
        raise common.InputError(
            "submitit is not installed: pip install 'rdma-kv-cache[slurm]', or use --sbatch"
        )
    try:
        site = load_site(os.environ)
    except JobError as error:
        raise common.InputError(str(error)) from error
    submission = Submission(
        kind=kind,
        name=job_name(name or job_file.stem),
        job=job,
        runs=site.runs_path if runs is None else runs.absolute(),
        program=own_program(),
        arguments=tuple(arguments),
        site=site,
        sbatch_options=tuple(sbatch_options),
    )
    return Request(submission, job_file, via_submitit, output)


def check_model(request: Request) -> None:
    """Raise InputError if the nodes would not find the whole model, before they are taken."""
    from rdma_kv_cache.config.model_files import cached_folder, missing
    from rdma_kv_cache.slurm.site import expanded

    site, name = request.submission.site, request.submission.job.model.name
    folder: Path | None = Path(name)
    if not Path(name).is_absolute():
        if not site.offline:
            return  # the nodes download it
        cache = {"HF_HOME": str(expanded(site.model_cache))} if site.model_cache else {}
        folder = cached_folder(name, {**os.environ, **cache})
    problems = ["it is not in the cache"] if folder is None else missing(folder)
    if problems:
        raise common.InputError(
            f"model {name}: {'; '.join(problems)}. Get it here, where there is a network: rdma-kv "
            f"fetch {name}; or say --no-model-check, or site.offline: false if the nodes have one"
        )


def script_of(request: Request) -> str:
    """Return the script that is submitted for the request; a wrong job becomes an InputError."""
    from rdma_kv_cache.config import JobError
    from rdma_kv_cache.slurm.script import render
    from rdma_kv_cache.slurm.submit import for_submitit

    submission = request.submission
    try:
        return render(for_submitit(submission) if request.via_submitit else submission)
    except JobError as error:
        raise common.InputError(str(error)) from error


def send(request: Request) -> Record:
    """Submit the request. Raises SlurmError, OSError; a wrong job becomes an InputError."""
    from rdma_kv_cache.cli.submitit_function import Command
    from rdma_kv_cache.config import JobError
    from rdma_kv_cache.slurm.submit import submit

    submission = request.submission
    function = Command(submission.kind, submission.arguments) if request.via_submitit else None
    try:
        return submit(submission, request.job_file, function=function, output=request.output)
    except JobError as error:
        raise common.InputError(str(error)) from error


def submit_and_follow(make: Callable[..., Request], *arguments: str) -> int:
    """Submit through submitit what `make` returns for `arguments`, and say its states to its end.

    Returns the exit code; what is wrong is said, not raised.
    """
    from rdma_kv_cache.slurm.programs import SlurmError

    try:
        request = make(*arguments)
        from rdma_kv_cache.slurm.submitit_executor import follow, job_of

        record = send(request)
        click.echo(f"job {record.job_id}: run folder {record.run_dir}")
        return follow(job_of(record), click.echo)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SlurmError as error:
        common.say(f"Error: {error}")
        return 1


def batch_arguments(prompts: Path, out: Path, further: Sequence[str]) -> list[str]:
    """Return the arguments of `rdma-kv batch`, the prompts checked."""
    from rdma_kv_cache.batch import BatchError, scan

    try:
        scan(prompts)
    except BatchError as error:
        raise common.InputError(str(error)) from error
    return [str(prompts.absolute()), "-o", str(out.absolute()), *further]


def _check_arguments(kind: Kind, arguments: Sequence[str]) -> None:
    """Let the command that the job runs parse its arguments. Raises click.UsageError."""
    from rdma_kv_cache.cli.batch import batch
    from rdma_kv_cache.cli.serve import serve

    command = serve if kind == "serve" else batch
    command.make_context(f"rdma-kv {kind}", [*arguments, "--config", "job.yaml"])
