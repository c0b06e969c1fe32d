#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A server as a Slurm job through submitit: submits it, says its states, ends it on Ctrl-C.

    python jobs/serve.py jobs/configs/llama-3.1-8b-2p2d-a100.yaml [option of `rdma-kv serve`]...

To submit and go away: rdma-kv submit serve --config FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rdma_kv_cache.cli.submission import Request, make_request, submit_and_follow


def server(job_file: str, *further: str) -> Request:
    """What to submit."""
    return make_request("serve", further, job_file=Path(job_file), via_submitit=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(submit_and_follow(server, *sys.argv[1:]))
