#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A server as a Slurm job through submitit: submits it, says its states, ends it on Ctrl-C.

    python jobs/serve.py jobs/configs/llama-3.1-8b-2p2d-a100.yaml [option of `rdma-kv serve`]...

To submit and go away: rdma-kv submit serve --config FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rdma_kv_cache.cli.submission import make_request, send
from rdma_kv_cache.slurm.programs import SlurmError


def main(job_file: str, *further: str) -> int:
    """Run one server to its end; returns the exit code."""
    request = make_request("serve", further, job_file=Path(job_file), via_submitit=True)
    from rdma_kv_cache.slurm.submitit_executor import follow, job_of

    record = send(request)
    print(f"job {record.job_id}: run folder {record.run_dir}", flush=True)
    return follow(job_of(record), print)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SlurmError as error:
        sys.exit(f"Error: {error}")
