# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv serve`: the engines of a job file as one OpenAI-compatible URL."""

from __future__ import annotations

import shlex
from pathlib import Path  # noqa: TC003 (click calls it)
from typing import TYPE_CHECKING

import click

from rdma_kv_cache.cli import common

if TYPE_CHECKING:
    from rdma_kv_cache.cluster.launch import Cluster


@click.command(short_help="Serve a job's engines at one OpenAI-compatible URL.")
@common.job_options(required=True)
def serve(job_file: Path, overrides: tuple[str, ...], run_dir: Path | None) -> None:
    """Serve a job's engines at one OpenAI-compatible URL until Ctrl-C or SIGTERM.

    Requests in flight are answered before it ends. Exit code: 0 after an orderly stop, 1 when the
    engines do not start or are lost, 2 for a bad job file.

    \b
    Example:
      rdma-kv serve --config jobs/configs/smollm2-135m-1p1d-cpu.yaml --set orchestrator.port=8000
    """
    job = common.load(job_file, overrides)
    common.raise_on_sigterm()
    with common.running_cluster(job_file, job, run_dir) as cluster:
        _introduce(cluster)
        try:
            cluster.wait()
        except (KeyboardInterrupt, common.Terminated):
            common.say("Stopping; requests in flight are answered first.")
            cluster.stop(common.STOP_TIMEOUT_S)


def _introduce(cluster: Cluster) -> None:
    click.echo(f"Serving {cluster.url}")
    header = ""
    if cluster.api_key:
        key_file = cluster.run_dir.api_key_file
        click.echo(f"API key in {key_file}")
        header = f' -H "Authorization: Bearer $(cat {shlex.quote(str(key_file))})"'
    body = '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
    click.echo(
        f"Try: curl -s {cluster.url}/v1/completions{header} "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )
