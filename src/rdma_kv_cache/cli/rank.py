# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv rank`: one MPI rank of a job; started by mpiexec or srun, not by people."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

import click

log = logging.getLogger(__name__)


@click.command(hidden=True)
@click.option("--config", "job_file", type=click.Path(path_type=Path), required=True)
@click.option("--run-dir", type=click.Path(path_type=Path), required=True)
def rank(job_file: Path, run_dir: Path) -> None:
    """Be one MPI rank of a job: rank 0 the orchestrator, the others an engine each.

    \b
    Example:
      mpiexec -disable-auto-cleanup -n 3 rdma-kv rank --config runs/demo/job.yaml --run-dir runs/demo
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    code = 1
    try:
        code = _run(job_file, run_dir)
    except Exception:
        log.exception("this rank ends")
    finally:
        # MPI_Finalize waits for all ranks, also for dead ones; this one must end whatever they do.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(job_file: Path, run_dir: Path) -> int:
    from rdma_kv_cache.cluster import engine_rank, world
    from rdma_kv_cache.cluster.run_dir import RunDir
    from rdma_kv_cache.config import load_job
    from rdma_kv_cache.orchestrator import server

    # The launcher wrote this file after all overrides: the environment has had its say.
    job = load_job(job_file, env={})
    joined = world.join(job)
    folder = RunDir(run_dir)
    if joined.rank == 0:
        return asyncio.run(server.run(joined, job, folder))
    return asyncio.run(engine_rank.run(joined, job, folder))
