# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv submit`: a job file as a Slurm job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rdma_kv_cache.cli import common, lookup
from rdma_kv_cache.cli import submission as sub

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Print the script; submit and write nothing."
)

model_check_option = click.option(
    "--model-check/--no-model-check",
    default=True,
    help="Submit only if the model is complete here.",
)


@click.group(short_help="Submit a job to Slurm.")
def submit() -> None:
    """Submit a job file to Slurm: a heterogeneous job of prefill and decode nodes.

    The job runs `rdma-kv serve` or `rdma-kv batch` over its nodes. How it is doing: rdma-kv list,
    status, logs, stop.

    Exit code: 0 if it is submitted, 1 if Slurm is missing or refuses it, 2 for bad input.

    \b
    Example:
      rdma-kv submit serve --config jobs/configs/llama-3.1-8b-2p2d-a100.yaml
      rdma-kv submit batch prompts.jsonl -o answers.jsonl --config job.yaml --dry-run
    """


@submit.command("serve", context_settings=sub.PASS_ON, short_help="Serve at one URL.")
@sub.submission_options
@dry_run_option
@model_check_option
@lookup.json_option
def submit_serve(
    dry_run: bool, model_check: bool, as_json: bool, further: tuple[str, ...], **options: Any
) -> None:
    """Serve a job's engines at one OpenAI-compatible URL, until stopped or at the time limit.

    Options not listed here are those of `rdma-kv serve`.

    \b
    Example:
      rdma-kv submit serve --config job.yaml --set slurm.time=8:00:00
      rdma-kv submit serve --config job.yaml --option=--reservation=demo --json | jq .job_id
    """
    request = sub.make_request("serve", further, **options)
    _submit(request, dry_run, model_check, as_json)


@submit.command("batch", context_settings=sub.PASS_ON, short_help="Run a file of prompts.")
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Answer file."
)
@sub.submission_options
@dry_run_option
@model_check_option
@lookup.json_option
def submit_batch(
    prompts: Path,
    out: Path,
    dry_run: bool,
    model_check: bool,
    as_json: bool,
    further: tuple[str, ...],
    **options: Any,
) -> None:
    """Run the OpenAI Batch lines of PROMPTS, and end: the job's exit code is the batch's.

    Options not listed here are those of `rdma-kv batch`. A job that was stopped is continued by
    submitting it again, also with other numbers of nodes and engines.

    \b
    Example:
      rdma-kv submit batch prompts.jsonl -o answers.jsonl --config job.yaml --concurrency 64
    """
    arguments = sub.batch_arguments(prompts, out, further)
    request = sub.make_request("batch", arguments, output=str(out.absolute()), **options)
    _submit(request, dry_run, model_check, as_json)


def _submit(request: sub.Request, dry_run: bool, model_check: bool, as_json: bool) -> None:
    import msgspec

    from rdma_kv_cache.slurm.programs import SlurmError

    script = sub.script_of(request)  # what is wrong with the job comes before its model
    if dry_run:
        click.echo(script, nl=False)
        return
    if model_check:
        sub.check_model(request)
    try:
        record = sub.send(request)
    except SlurmError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(
            f"cannot write {error.filename or request.submission.runs}: {error.strerror}; another "
            "folder for runs: --runs, or site.runs of the site file"
        ) from error
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(record)).decode())
        return
    click.echo(f"Submitted job {record.job_id} ({record.name}) by {record.via}")
    click.echo(f"Run folder {record.run_dir}")
    common.say(f"How it is doing: rdma-kv status {record.job_id} --watch")
