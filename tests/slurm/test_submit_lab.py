# SPDX-License-Identifier: Apache-2.0
"""What is submitted, on a real Slurm: the scripts start, and find what they need."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rdma_kv_cache.config import load_job
from rdma_kv_cache.slurm import records

if TYPE_CHECKING:
    from tests.slurm import Lab

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]
RDMA_KV = (sys.executable, "-m", "rdma_kv_cache.cli")
JOB = """\
model: {name: org/model}
prefill: {engines: 2, nodes: 2, constraint: prefill, gres: "gpu:prefill:1"}
decode: {engines: 1, constraint: decode, gres: "gpu:decode:2"}
slurm:
  time: 2
  signal_s: 30
"""
# In place of the ranks: the job ends with the last set-up line.
RANKS = """srun --label --het-group=0 --ntasks=3 hostname : --het-group=1 --ntasks=1 hostname
exit 0"""


@pytest.fixture
def place(lab: Lab) -> Path:
    """A new folder that all nodes see, with a job file."""
    folder = lab.shared / os.urandom(4).hex()
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    return folder


def submit(lab: Lab, place: Path, *arguments: str) -> records.Record:
    """`rdma-kv submit serve` there; its record."""
    command = [*RDMA_KV, "submit", "serve", "--config", "job.yaml", "--runs", "runs", "--json"]
    command += ["--no-model-check"]
    env = {"HOME": str(place)}
    said = json.loads(lab.check(*command, *arguments, cwd=place, env=env))
    record = records.read(Path(said["folder"]))
    assert record is not None
    assert record.job_id == said["job_id"]
    return record


def test_a_heterogeneous_job_by_sbatch(lab: Lab, place: Path) -> None:
    record = submit(lab, place, "--sbatch", "--set", f"slurm.setup={json.dumps([RANKS])}")
    states = lab.wait_for(record.job_id, "COMPLETED")
    assert len(states) == 2
    lines = record.path.with_name(f"job-{record.job_id}.out").read_text().splitlines()
    ranks = dict(line.split(": ") for line in lines if line[:1].isdigit())
    assert {"0": ranks["0"], "3": ranks["3"]} == {"0": "p0", "3": "d0"}
    assert sorted(ranks.values()) == ["d0", "p0", "p0", "p1"]
    job = load_job(record.run_dir / "job.yaml", {})
    assert job.prefill == load_job(place / "job.yaml", {}).prefill


def test_one_plain_job(lab: Lab, place: Path) -> None:
    ranks = "srun --label --nodes=2 --ntasks=4 hostname\nexit 0"
    record = submit(
        lab,
        place,
        *("--sbatch", "--set", "slurm.one_component=true", "--set", "slurm.nodes=2"),
        *("--set", "prefill.gres=gpu:2", "--set", "decode.gres=gpu:2"),
        *("--set", "decode.constraint=prefill", "--set", f"slurm.setup={json.dumps([ranks])}"),
    )
    assert lab.wait_for(record.job_id, "COMPLETED") == {str(record.job_id): "COMPLETED"}


def test_a_set_up_line_that_fails_fails_the_job(lab: Lab, place: Path) -> None:
    record = submit(lab, place, "--sbatch", "--set", 'slurm.setup=["false"]')
    assert "FAILED" in lab.wait_for(record.job_id, "FAILED", "CANCELLED").values()


def test_what_slurm_refuses_is_told(lab: Lab, place: Path) -> None:
    done = lab.run(
        *RDMA_KV,
        *(
            "submit",
            "serve",
            "--config",
            "job.yaml",
            "--runs",
            "runs",
            "--sbatch",
            "--no-model-check",
        ),
        *("--set", "slurm.partition=none"),
        cwd=place,
        env={"HOME": str(place)},
    )
    assert done.returncode == 1
    assert "sbatch: error: Batch job submission failed: Invalid partition" in done.stderr


@pytest.mark.parametrize("kind", ["serve", "batch"])
def test_the_scripts_for_sbatch(lab: Lab, place: Path, kind: str) -> None:
    # It makes the run folder, and says what it would run.
    program = place / "rdma-kv"
    ours = shlex.join(RDMA_KV)
    program.write_text(f'#!/bin/sh\n[ "$1" = adopt ] && exec {ours} "$@"\necho "$@"\n')
    program.chmod(0o755)
    files = [] if kind == "serve" else ["in.jsonl", "out.jsonl"]
    script = REPOSITORY / "sbatch" / f"{kind}.sbatch"
    env = {"HOME": str(place), "RDMA_KV": str(program)}
    job = lab.submit(script, "job.yaml", *files, cwd=place, env=env)
    assert len(lab.wait_for(job, "COMPLETED")) == 2
    folder = place / "rdma-kv-runs" / f"rdma-kv-{kind}-{job}"
    record = records.read(folder)
    assert record is not None
    assert (record.job_id, record.kind) == (job, kind)
    output = folder.with_name(f"rdma-kv-{kind}-{job}.out")
    assert output.resolve() == place / f"rdma-kv-{kind}-{job}.out"
    options = f"--config {place}/job.yaml --run-dir {folder}/attempt-0"
    assert output.read_text().strip().endswith(options)


@pytest.mark.parametrize(
    ("how", "code", "state", "words"),
    [
        ("well", 0, "COMPLETED,COMPLETED", "ended well"),
        ("badly", 1, "FAILED,", "ValueError: badly"),
    ],
)
def test_a_job_through_submitit(
    accounting_lab: Lab, how: str, code: int, state: str, words: str
) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed (the extra `slurm`)")
    lab = accounting_lab
    place = lab.shared / os.urandom(4).hex()
    place.mkdir()
    (place / "through_submitit.py").write_text(THROUGH_SUBMITIT)
    (place / "job.yaml").write_text(JOB)
    env = {"HOME": str(place), "PYTHONPATH": str(place)}
    command = [sys.executable, "-m", "through_submitit", how]
    said = lab.check(*command, cwd=place, env=env, timeout_s=60)
    assert ": RUNNING, RUNNING\n" in said
    assert words in said
    last = said.splitlines()[-1]
    assert last.startswith(f"code {code}, {state}"), said
    (output,) = (place / "runs").glob("small-*.out")
    assert f"I am {how} in {output.with_suffix('')}/attempt-0" in output.read_text()


THROUGH_SUBMITIT = """\
import os
import sys
import time
from pathlib import Path

from rdma_kv_cache.config import load_job
from rdma_kv_cache.slurm import submitit_executor
from rdma_kv_cache.slurm.script import RUN_VARIABLE, Submission
from rdma_kv_cache.slurm.submit import submit


class Function:
    def __init__(self, how):
        self.how = how

    def __call__(self):
        print("I am", self.how, "in", os.environ[RUN_VARIABLE])
        time.sleep(8)
        if self.how == "badly":
            raise ValueError(self.how)
        return 0


if __name__ == "__main__":
    from through_submitit import Function

    submission = Submission(
        "serve", "small", load_job("job.yaml", {}), Path("runs").absolute(), ("true",)
    )
    record = submit(submission, Path("job.yaml"), function=Function(sys.argv[1]))
    job = submitit_executor.job_of(record)
    code = submitit_executor.follow(job, print, poll_s=0.5)
    deadline = time.monotonic() + 30
    while "RUNNING" in job.component_states and time.monotonic() < deadline:
        time.sleep(1)
        job.get_info(mode="force")
    print(f"code {code}, {','.join(job.component_states)}")
"""
