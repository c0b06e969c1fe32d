# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv config`: check a job file, or list all its keys."""

from __future__ import annotations

from pathlib import Path

import click

from rdma_kv_cache.cli import common


@click.command(short_help="Check a job file, or list all keys.")
@click.argument("job_file", type=click.Path(path_type=Path), required=False)
@common.set_option
@click.option("--keys", is_flag=True, help="Print the table of all keys.")
def config(job_file: Path | None, overrides: tuple[str, ...], keys: bool) -> None:
    """Check JOB_FILE and print it as the engines will see it, with all defaults and overrides.

    The command line wins over the environment (MODEL_NAME, MODEL_MAX_LEN, GPU_MEMORY_UTILIZATION,
    TENSOR_PARALLEL_SIZE), that over the job file, that over the site file ($RDMA_KV_SITE, else
    ~/.config/rdma-kv/site.yaml). The keys of `site` are for the site file only.

    \b
    Example:
      rdma-kv config --keys
      rdma-kv config jobs/configs/smollm2-135m-1p1d-cpu.yaml --set rdma.queue_depth=256
    """
    if keys:
        _print_keys()
    elif job_file is None:
        raise click.UsageError("Give a JOB_FILE to check, or --keys for the table of all keys.")
    else:
        _print_job(job_file, overrides)


def _print_job(job_file: Path, overrides: tuple[str, ...]) -> None:
    from rdma_kv_cache.config import dump_job

    job = common.load(job_file, overrides)
    if job.orchestrator.api_key not in ("auto", "none"):
        hidden = job.orchestrator.model_copy(update={"api_key": "(hidden)"})
        job = job.model_copy(update={"orchestrator": hidden})
    click.echo(dump_job(job), nl=False)


def _print_keys() -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from rdma_kv_cache.config import key_rows
    from rdma_kv_cache.slurm.site import SiteFile

    table = Table("Key", "Type", "Default", "Meaning", box=SIMPLE)
    for row in (*key_rows(), *key_rows(SiteFile)):
        table.add_row(*row)
    console = Console(markup=False)
    if not console.is_terminal:
        # Into a file or a pager nothing is to be folded.
        console.width = 160
    console.print(table)
