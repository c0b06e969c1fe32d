# SPDX-License-Identifier: Apache-2.0
"""The start of a job, split into stages: what Slurm, vLLM and our own parts take of it."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdma_kv_cache.cluster.run_dir import RunDir


def stages(run: RunDir, submitted: float) -> dict[str, float]:
    """Seconds of each stage, from submission to READY.

    slurm: until the batch script has made its run folder. ranks: our program, the launcher, MPI,
    until rank 0 answers HTTP. vllm: until every worker has registered its KV cache. connect: until
    every pair has served a request; a vLLM that still warms up counts there, a stand-in does not.
    """
    events = [json.loads(line) for line in run.events_file.read_text().splitlines()]
    at = {e["stage"]: e["time"] for e in events if e["event"] == "run"}
    made = run.path.resolve()
    # Its birth: Python 3.11 has no name for it on Linux.
    born = subprocess.run(["stat", "-c", "%.W", made], capture_output=True, text=True, check=True)
    script = float(born.stdout)
    return {
        "slurm": script - submitted,
        "ranks": at["the engines start vLLM"] - script,
        "vllm": at["the engines connect"] - at["the engines start vLLM"],
        "connect": at["serving"] - at["the engines connect"],
    }
