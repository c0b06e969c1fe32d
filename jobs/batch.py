#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A file of prompts as a Slurm job through submitit: submits it, says its states until it is done.

    python jobs/batch.py CONFIG PROMPTS OUT [option of `rdma-kv batch`]...

Ctrl-C ends the job; run again, it goes on where it was. To submit and go away:
rdma-kv submit batch PROMPTS -o OUT --config CONFIG.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rdma_kv_cache.cli.submission import batch_arguments, make_request, send
from rdma_kv_cache.slurm.programs import SlurmError


def main(job_file: str, prompts: str, out: str, *further: str) -> int:
    """Run one batch to its end; returns the exit code."""
    arguments = batch_arguments(Path(prompts), Path(out), further)
    request = make_request(
        "batch",
        arguments,
        job_file=Path(job_file),
        via_submitit=True,
        output=str(Path(out).absolute()),
    )
    from rdma_kv_cache.slurm.submitit_executor import follow, job_of

    record = send(request)
    print(f"job {record.job_id}: run folder {record.run_dir}", flush=True)
    return follow(job_of(record), print)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SlurmError as error:
        sys.exit(f"Error: {error}")
