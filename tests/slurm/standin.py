# SPDX-License-Identifier: Apache-2.0
"""Serving jobs on a lab, with stand-ins for vLLM: everything else is the product's."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rdma_kv_cache.cluster.run_dir import RunDir, RunState
from tests.cluster.conftest import STANDIN, python_path
from tests.slurm.machine import poll

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.slurm import Lab

RDMA_KV = (sys.executable, "-m", "rdma_kv_cache.cli")
START_S = 60.0
STOP_S = 60.0


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    lab: Lab
    job_id: int
    folder: Path
    submitted: float

    @property
    def run(self) -> RunDir:
        """Its run folder."""
        return RunDir(self.folder / "latest")

    def state(self) -> RunState:
        """What its orchestrator says."""
        return self.run.read_state() or RunState("STARTING", "no orchestrator yet")

    def wait(self, *states: str, timeout_s: float = START_S) -> RunState:
        """Wait for a state of the run. Raises AssertionError with its logs."""
        assert poll(lambda: self.state().state in states, timeout_s), self.logs()
        return self.state()

    def logs(self) -> str:
        """Everything that the job said."""
        output = self.folder.with_name(self.folder.name + ".out")
        texts = [output, *sorted((self.folder / "latest" / "logs").glob("*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in texts if path.exists())

    def stop(self) -> str:
        """`rdma-kv stop`; what it says."""
        runs = ["--runs", str(self.folder.parent)]
        return self.lab.check(*RDMA_KV, "stop", str(self.job_id), *runs, timeout_s=STOP_S)


def submit(lab: Lab, place: Path, *arguments: str, before: Sequence[str] = (), **job: Any) -> Job:
    """`rdma-kv submit serve` of a job with one prefill and two decode engines, on a node each.

    `before`: what stands before that command.
    """
    place.mkdir(exist_ok=True)
    base: dict[str, Any] = {
        "model": {"name": "org/model", "max_model_len": 128},
        "prefill": {"engines": 1, "constraint": "prefill"},
        "decode": {"engines": 2, "nodes": 2, "constraint": "decode"},
        "orchestrator": {"heartbeat_s": 0.5, "health_timeout_s": 4},
    }
    job["slurm"] = {"time": "10", "signal_s": 120, **job.get("slurm", {})}
    (place / "job.yaml").write_text(yaml.safe_dump({**base, **job}))
    own = ["--config", "job.yaml", "--runs", "runs", "--json", "--sbatch"]
    own += ["--no-model-check"]  # the stand-ins load none
    env = {"HOME": str(place), "PYTHONPATH": python_path(STANDIN)}
    began = time.time()
    said = lab.check(*before, *RDMA_KV, "submit", "serve", *own, *arguments, cwd=place, env=env)
    record = json.loads(said)
    return Job(lab, record["job_id"], Path(record["folder"]), began)
