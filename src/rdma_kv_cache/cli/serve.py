# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv serve`: the engines of a job file as one OpenAI-compatible URL."""

from __future__ import annotations

import shlex
from pathlib import Path  # noqa: TC003 (click calls it)
from typing import TYPE_CHECKING

import click

from rdma_kv_cache.cli import common
from rdma_kv_cache.cli.chain import chain_option, open_link, submit_fallback

if TYPE_CHECKING:
    from rdma_kv_cache.cluster.launch import Cluster
    from rdma_kv_cache.config import JobConfig
    from rdma_kv_cache.slurm.chain import Handover
    from rdma_kv_cache.slurm.service import Service


@click.command(short_help="Serve a job's engines at one OpenAI-compatible URL.")
@common.job_options(required=True)
@chain_option(
    "submit a successor, at most so many. It starts before the time limit, and this job hands over "
    "to it when it is READY; or when this job fails, scancel included: end a chain by rdma-kv stop. "
    "All have one API key."
)
def serve(
    job_file: Path, overrides: tuple[str, ...], run_dir: Path | None, chain: int | None
) -> None:
    """Serve a job's engines at one OpenAI-compatible URL until Ctrl-C or SIGTERM.

    Inside a Slurm job the engines run on all of its nodes, else on this machine. Requests in flight
    are answered before it ends. SIGUSR1 is Slurm's warning that the job's time limit is near.

    \b
    Exit code:
      0    after an orderly stop, or after a successor has taken over
      1    the engines do not start, or are lost
      2    bad job file
      138  the time limit came (SIGUSR1) and no successor has taken over

    \b
    Example:
      rdma-kv serve --config jobs/configs/smollm2-135m-1p1d-cpu.yaml --set orchestrator.port=8000
      rdma-kv submit serve --config jobs/configs/llama-3.1-8b-2p2d-a100.yaml --chain 6
    """
    from rdma_kv_cache.cli.time_limit import TimeLimit

    job = common.load(job_file, overrides)
    handover = None if chain is None else _handover(chain, run_dir)
    if handover is not None:
        job = _with_key(job, handover.service)
    common.raise_on_sigterm()
    with common.running_cluster(job_file, job, run_dir) as cluster:
        _introduce(cluster)
        TimeLimit(cluster, job.slurm.signal_s, handover).watch()
        if handover is not None:
            handover.publish(cluster.url)
        try:
            cluster.wait()
        except (KeyboardInterrupt, common.Terminated) as end:
            common.say("Stopping; requests in flight are answered first.")
            cluster.stop(common.STOP_TIMEOUT_S)
            if isinstance(end, common.Terminated) and end.code == common.EXIT_TIME_LIMIT:
                raise


def _handover(length: int, run_dir: Path | None) -> Handover:
    from rdma_kv_cache.slurm.chain import Handover
    from rdma_kv_cache.slurm.service import open_service

    link = open_link(length, run_dir)
    assert run_dir is not None  # else open_link refuses
    try:
        service = open_service(link.record.path.parent, link.record.name)
    except OSError as error:
        raise common.InputError(f"{error.filename}: {error.strerror}") from error
    return Handover(link, service, run_dir.absolute(), submit_fallback(link))


def _with_key(job: JobConfig, service: Service) -> JobConfig:
    """Return the job with the service's key, which its clients have already."""
    if job.orchestrator.api_key != "auto":
        return job
    keyed = job.orchestrator.model_copy(update={"api_key": service.key()})
    return job.model_copy(update={"orchestrator": keyed})


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
