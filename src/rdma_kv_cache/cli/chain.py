# SPDX-License-Identifier: Apache-2.0
"""The option --chain of `serve` and `batch`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rdma_kv_cache.cli import common

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rdma_kv_cache.slurm.chain import Link

    _F = TypeVar("_F", bound=Callable[..., Any])


def chain_option(text: str) -> Callable[[_F], _F]:
    """Return a decorator that adds --chain; `text` says what the successors are for."""
    return click.option(
        "--chain", type=click.IntRange(1, 1000), metavar="JOBS", help=f"In a Slurm job: {text}"
    )


def open_link(length: int, run_dir: Path | None) -> Link:
    """Return this job's place in its chain; an InputError outside of a submitted job."""
    from rdma_kv_cache.slurm import records
    from rdma_kv_cache.slurm.chain import Link
    from rdma_kv_cache.slurm.environment import allocation

    here = allocation(os.environ)
    record = None if run_dir is None else records.read(run_dir.absolute().parent)
    if here is None or record is None:
        raise common.InputError(
            "--chain is for jobs that `rdma-kv submit` submitted: only those have a script that can "
            "be submitted again"
        )
    return Link(here, record, length)


def submit_fallback(link: Link) -> int | None:
    """Submit the successor that waits for this job's end; None if the chain has its length.

    A job that cannot have one says so and goes on.
    """
    from rdma_kv_cache.slurm.programs import SlurmError

    try:
        job_id = link.submit_fallback()
    except (SlurmError, OSError) as error:
        common.say(f"--chain: no successor: {error}")
        return None
    if job_id is not None:
        common.say(f"Job {job_id} goes on if this one fails.")
    return job_id
