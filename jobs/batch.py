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

from rdma_kv_cache.cli.submission import (
    Request,
    batch_arguments,
    make_request,
    submit_and_follow,
)


def batch(job_file: str, prompts: str, out: str, *further: str) -> Request:
    """What to submit."""
    arguments = batch_arguments(Path(prompts), Path(out), further)
    return make_request(
        "batch",
        arguments,
        job_file=Path(job_file),
        via_submitit=True,
        output=str(Path(out).absolute()),
    )


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(submit_and_follow(batch, *sys.argv[1:]))
