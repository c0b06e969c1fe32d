# SPDX-License-Identifier: Apache-2.0
"""`list`, `status` and `stop` on a real Slurm, with a job that shows what `serve` shows."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rdma_kv_cache.config import JobConfig
from rdma_kv_cache.slurm import queue, records
from rdma_kv_cache.slurm.script import Submission, render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.slurm import Lab

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
WATCH_S = 6.0
JOB = {
    "model": {"name": "test/model"},
    "prefill": {"constraint": "prefill"},
    "decode": {"engines": 2, "nodes": 2, "constraint": "decode"},
    "slurm": {"time": "10"},
}


class Jobs:
    """Jobs and the commands on them, from the controller."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.runs = lab.shared / "runs"
        self.runs.mkdir(exist_ok=True)

    def submit(self, *options: str) -> int:
        command = f"env PYTHONPATH={ROOT} {sys.executable} -m tests.slurm.served"
        submission = Submission(
            kind="serve",
            name="served",
            job=JobConfig.model_validate(JOB),
            runs=self.runs,
            program=(),
            command=f'{command} "$run"',
        )
        script = self.lab.shared / "served.sh"
        script.write_text(render(submission))
        job_id = self.lab.submit(*options, script)
        record = records.Record(
            job_id=job_id,
            name="served",
            kind="serve",
            folder=str(records.job_folder(self.runs, "served", job_id)),
            job_file="/jobs/served.yaml",
            submitted=time.time(),
        )
        records.write(record)
        return job_id

    def command(self, name: str, *arguments: object) -> list[str]:
        program = [sys.executable, "-m", "rdma_kv_cache.cli", name, *map(str, arguments)]
        return [*program, "--runs", str(self.runs)]

    def run(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.lab.run(*self.command(name, *arguments), timeout_s=90.0)

    def view(self, job_id: int, *arguments: object) -> dict[str, Any]:
        done = self.run("status", job_id, "--json", *arguments)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def view_when(self, job_id: int, state: str, timeout_s: float = 30.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while (view := self.view(job_id))["state"] != state:
            assert time.monotonic() < deadline, view
        return view

    def queries(self) -> int:
        """How often Slurm was asked for its jobs since `sdiag --reset`."""
        found = re.search(r"REQUEST_JOB_INFO\D+2003\D+(\d+)", self.lab.check("sdiag"))
        return int(found[1]) if found else 0


@pytest.fixture
def jobs(lab: Lab) -> Jobs:
    return Jobs(lab)


def test_a_job_from_its_start_to_its_end(jobs: Jobs) -> None:
    job_id = jobs.submit()
    view = jobs.view(job_id, "--wait", 60)
    assert (view["state"], view["verified"], view["notes"]) == ("READY", True, [])
    host, port = re.fullmatch(r"http://(p[01]):(\d+)", view["url"]).groups()  # type: ignore[union-attr]
    assert f"-L {port}:{host}:{port} " in view["tunnel"]
    assert Path(view["api_key_file"]).stat().st_mode & 0o777 == 0o600
    assert [part["nodes"] for part in view["components"]] == [host, "d[0-1]"]
    assert [engine["name"] for engine in view["engines"]] == ["prefill-0", "decode-0"]
    (listed,) = [v for v in json.loads(jobs.run("list", "--json").stdout) if v["job_id"] == job_id]
    assert listed["state"] == "READY"
    stopped = jobs.run("stop", job_id)
    assert stopped.stdout == f"{job_id}: stopped in order\n", stopped.stderr
    assert set(jobs.lab.states(job_id).values()) == {"COMPLETED"}
    assert jobs.view(job_id)["state"] == "DONE"
    assert (jobs.runs / f"served-{job_id}" / "slurm.json").exists()


def test_a_job_that_waits(jobs: Jobs) -> None:
    job_id = jobs.submit("--hold")
    view = jobs.view(job_id)
    assert (view["state"], view["url"]) == ("PENDING", "")
    assert view["detail"].startswith("JobHeldUser: it is held")
    assert jobs.run("stop", job_id).stdout == f"{job_id}: cancelled before it started\n"
    assert jobs.view(job_id)["detail"].startswith("CANCELLED")


def test_a_lost_component_is_told(jobs: Jobs) -> None:
    job_id = jobs.submit()
    jobs.view(job_id, "--wait", 60)
    jobs.lab.check("scancel", f"{job_id}+1")
    deadline = time.monotonic() + 30
    while not (notes := jobs.view(job_id)["notes"]):
        assert time.monotonic() < deadline
    assert notes == ["component 1 (d[0-1]) is CANCELLED: its engines are lost"]
    assert jobs.view(job_id)["state"] == "READY"
    jobs.lab.check("scancel", str(job_id))
    jobs.view_when(job_id, "DONE")


def test_a_lost_node_ends_the_job_as_failed(jobs: Jobs) -> None:
    job_id = jobs.submit()
    jobs.view(job_id, "--wait", 60)
    jobs.lab.check("scontrol", "update", "nodename=d0", "state=down", "reason=test")
    assert jobs.view_when(job_id, "FAILED")["detail"] == "NODE_FAIL: a node was lost"


def test_watching_asks_slurm_seldom(jobs: Jobs) -> None:
    job_id = jobs.submit()
    jobs.view(job_id, "--wait", 60)
    jobs.lab.check("sdiag", "--reset")
    command = jobs.command("status", job_id, "--watch", "--json")
    with jobs.lab.popen(*command, stdout=subprocess.PIPE) as process:
        time.sleep(WATCH_S)
        process.send_signal(signal.SIGKILL)
        lines = process.communicate()[0].splitlines()
    assert len(lines) >= 2
    assert {json.loads(line)["state"] for line in lines} == {"READY"}
    assert jobs.queries() == 1


def test_accounting_knows_how_a_job_ended(accounting_lab: Lab) -> None:
    script = accounting_lab.shared / "fails.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --time=5 --constraint=prefill --job-name=fails\n"
        "#SBATCH hetjob\n#SBATCH --time=5 --nodes=2 --constraint=decode\nexit 3\n"
    )
    job_id = accounting_lab.submit(script)

    def run(command: Sequence[str]) -> str:
        return accounting_lab.check(*command)

    deadline = time.monotonic() + 60
    # Accounting learns of a job piece by piece: at first of its leader alone, under another name.
    while not (job := queue.ended([job_id], run).get(job_id)) or len(job.components) < 2:
        assert time.monotonic() < deadline, job
        time.sleep(0.5)
    assert (job.name, job.leader.state, job.leader.reason) == ("fails", "FAILED", "3:0")
    assert [part.node_count for part in job.components] == [1, 2]
    assert job.components[1].nodes == "d[0-1]"
