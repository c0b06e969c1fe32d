# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv render`: the script that `submit` would submit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rdma_kv_cache.cli import submission as sub


@click.group(short_help="Print the script that submit would submit.")
def render() -> None:
    """Print exactly the batch script that `rdma-kv submit` would submit; needs no Slurm.

    It holds the job file after all overrides and needs nothing beside it, so that
    `rdma-kv render … --sbatch | sbatch` works too.

    Exit code: 0, or 2 for bad input.

    \b
    Example:
      rdma-kv render serve --config jobs/configs/llama-3.1-8b-2p2d-a100.yaml
      rdma-kv render batch prompts.jsonl -o answers.jsonl --config job.yaml >job.sh
    """


@render.command("serve", context_settings=sub.PASS_ON, short_help="The script of a server.")
@sub.submission_options
def render_serve(further: tuple[str, ...], **options: Any) -> None:
    """Print the script of `rdma-kv submit serve`; the options are the same.

    \b
    Example:
      rdma-kv render serve --config job.yaml --sbatch
    """
    click.echo(sub.script_of(sub.make_request("serve", further, **options)), nl=False)


@render.command("batch", context_settings=sub.PASS_ON, short_help="The script of a batch.")
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Answer file."
)
@sub.submission_options
def render_batch(prompts: Path, out: Path, further: tuple[str, ...], **options: Any) -> None:
    """Print the script of `rdma-kv submit batch`; the options are the same.

    \b
    Example:
      rdma-kv render batch prompts.jsonl -o answers.jsonl --config job.yaml --sbatch
    """
    arguments = sub.batch_arguments(prompts, out, further)
    click.echo(sub.script_of(sub.make_request("batch", arguments, **options)), nl=False)
