# SPDX-License-Identifier: Apache-2.0
"""Through submitit: our script, its bookkeeping, and the states of several components."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="submitit is not installed (the extra `slurm`)")

from submitit.core.utils import UncompletedJobError

from rdma_kv_cache.cli.submitit_function import Command, CommandFailed
from rdma_kv_cache.config import JobConfig
from rdma_kv_cache.slurm import submitit_executor
from rdma_kv_cache.slurm.records import read
from rdma_kv_cache.slurm.script import RUN_VARIABLE, Submission, render
from rdma_kv_cache.slurm.submit import for_submitit, submit

SBATCH = """#!/bin/bash
cp "${@: -1}" "$KEPT"
echo "Submitted batch job 41"
"""


@pytest.fixture
def submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    """A small job; there is an sbatch that keeps the script."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("KEPT", str(tmp_path / "submitted.sh"))
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (tmp_path / "bin" / name).write_text(SBATCH)
        (tmp_path / "bin" / name).chmod(0o755)
    job = JobConfig.model_validate({"model": {"name": "org/model"}, "slurm": {"time": "1:00:00"}})
    return Submission("serve", "small", job, tmp_path / "runs", ("/bin/rdma-kv",))


def answer(text: str) -> int:
    """A function for submitit, which must be found by name."""
    print(text, os.environ[RUN_VARIABLE])
    return 0


class Answer:
    """What submitit is to run in place of a server."""

    def __call__(self) -> int:
        return answer("ran in")


def test_the_script_differs_in_its_last_line_only(submission: Submission) -> None:
    ours = render(submission).rpartition("exec ")
    theirs = render(for_submitit(submission)).rpartition("exec ")
    assert ours[0] == theirs[0]
    assert "submitit.core._submit" in theirs[2]


def test_a_job_and_its_result(submission: Submission, tmp_path: Path) -> None:
    record = submit(submission, tmp_path / "job.yaml", function=Answer())
    folder = submission.runs / "small-41"
    assert (record.job_id, record.via) == (41, "submitit")
    assert read(folder) == record
    assert folder.stat().st_mode & 0o777 == 0o700
    script = tmp_path / "submitted.sh"
    assert script.read_text() == render(for_submitit(submission))
    assert (folder / "script.sh").read_text() == render(submission)
    # No link of submitit's is left beside the job's folder.
    assert [entry.name for entry in submission.runs.iterdir()] == ["small-41"]

    # What Slurm would do on the first node.
    env = {**os.environ, "SLURM_JOB_ID": "41", "SLURM_PROCID": "0"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        ["bash", str(script)], env=env, check=True, capture_output=True, text=True
    )
    assert f"ran in {folder}/attempt-0" in done.stdout
    job = submitit_executor.job_of(record)
    assert job.done()
    assert job.result() == 0
    assert submitit_executor.follow(job, print) == 0


@pytest.mark.parametrize("kind", ["serve", "batch"])
def test_the_programs_without_slurm(tmp_path: Path, kind: str) -> None:
    program = [sys.executable, str(Path(__file__).parents[2] / "jobs" / f"{kind}.py")]
    usage = subprocess.run(program, check=False, capture_output=True, text=True)
    assert usage.returncode == 1
    assert f"python jobs/{kind}.py" in usage.stderr
    (tmp_path / "job.yaml").write_text("model: {name: org/model}\n")
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    files = [] if kind == "serve" else ["in.jsonl", "out.jsonl"]
    env = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(
        [*program, "job.yaml", *files],
        cwd=tmp_path,
        env=env,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: no sbatch on PATH"), done.stderr


def test_no_arrays(submission: Submission) -> None:
    submission.runs.mkdir()
    executor = submitit_executor.HetExecutor(submission.runs, "", {})
    with pytest.raises(ValueError, match="array"):
        executor.map_array(answer, ["a", "b"])


@pytest.mark.parametrize(
    ("lines", "state", "components"),
    [
        (["41+0|RUNNING", "41+1|RUNNING", "41+0.batch|RUNNING"], "RUNNING", ["RUNNING"] * 2),
        # A lost component does not end the job: its leader decides.
        (["41+0|RUNNING", "41+1|CANCELLED by 0"], "RUNNING", ["RUNNING", "CANCELLED by 0"]),
        (["41+0|NODE_FAIL", "41+1|COMPLETED"], "NODE_FAIL", ["NODE_FAIL", "COMPLETED"]),
        (["41|COMPLETED"], "COMPLETED", ["COMPLETED"]),
    ],
)
def test_states_of_the_components(lines: list[str], state: str, components: list[str]) -> None:
    watcher = submitit_executor.HetWatcher()
    info = watcher.read_info("\n".join(["JobID|State", *lines]))["41"]
    assert info["State"] == state
    assert (info.get("Components") or info["State"]).split(",") == components


def test_the_command_runs_in_the_run_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path))
    command = pickle.loads(pickle.dumps(Command("serve", ("--help",))))
    assert command() == 0
    assert "Usage: rdma-kv serve" in capfd.readouterr().out
    with pytest.raises(CommandFailed, match="rdma-kv serve: exit code 2"):
        Command("serve", ())()
    assert f"{tmp_path}/job.yaml: cannot read the job file" in capfd.readouterr().err
    assert not issubclass(CommandFailed, UncompletedJobError)
