# SPDX-License-Identifier: Apache-2.0
"""The batch script: pinned by a golden file, clean to shellcheck, and it runs.

After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/slurm/test_script.py`, and read the diff.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rdma_kv_cache.config import JobConfig, JobError, load_job
from rdma_kv_cache.slurm.script import Submission, job_name, render
from rdma_kv_cache.slurm.site import Site

GOLDEN = Path(__file__).with_name("golden.sh")
RUNS = Path("/shared/runs")
PROGRAM = ("/shared/venv/bin/rdma-kv",)

FULL = Submission(
    kind="batch",
    name="llama-2p4d",
    job=JobConfig.model_validate(
        {
            "model": {"name": "org/model"},
            "prefill": {"engines": 2, "constraint": "a100", "gres": "gpu:a100:2"},
            "decode": {"engines": 4, "nodes": 2, "constraint": "h100&ib", "gres": "gpu:h100:2"},
            "slurm": {
                "account": "project 7",
                "partition": "gpu",
                "qos": "high",
                "time": "1-00:00:00",
                "cpus_per_task": 8,
                "mem": "0",
                "exclusive": True,
                "options": ["--reservation=it's ours", "--hint=nomultithread"],
                "modules": ["cuda/12.6", "gcc"],
                "setup": ["source /shared/venv/bin/activate", 'export NOTE="two words"'],
            },
        }
    ),
    runs=RUNS,
    program=PROGRAM,
    arguments=("/home/u/my prompts.jsonl", "-o", "/home/u/out.jsonl", "--concurrency", "64"),
    site=Site(model_cache="$SCRATCH/hf", mail="u@site.org"),
    sbatch_options=("--dependency=afterany:41",),
)


def plain(**sections: dict[str, Any]) -> Submission:
    """A server with defaults, and `sections`."""
    job = JobConfig.model_validate({"model": {"name": "org/model"}, **sections})
    return Submission("serve", "small", job, RUNS, PROGRAM)


def directives(script: str) -> list[list[str]]:
    """The #SBATCH options of each component."""
    components: list[list[str]] = [[]]
    for line in script.splitlines():
        if line == "#SBATCH hetjob":
            components.append([])
        elif line.startswith("#SBATCH "):
            components[-1].append(line.removeprefix("#SBATCH "))
    return components


def test_golden_file() -> None:
    script = render(FULL)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(script, encoding="utf-8")
    assert script == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on PATH")
@pytest.mark.parametrize("submission", [FULL, plain()], ids=["full", "plain"])
def test_shellcheck(submission: Submission, tmp_path: Path) -> None:
    path = tmp_path / "script.sh"
    path.write_text(render(submission))
    # The user's own set-up lines may source what is not here.
    command = ["shellcheck", "--exclude=SC1091", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_each_component_says_what_slurm_does_not_hand_on() -> None:
    script = render(plain(slurm={"account": "a", "partition": "p", "qos": "q", "time": "60"}))
    first, second = directives(script)
    shared = ["--account=a", "--partition=p", "--qos=q", "--time=60", "--signal=B:USR1@300"]
    assert [option for option in first if option in shared] == shared
    assert second[:5] == shared
    assert "--no-requeue" in first
    assert "--output=/shared/runs/%x-%j.out" in first


def test_one_component_is_no_heterogeneous_job() -> None:
    (only,) = directives(render(plain(slurm={"one_component": True, "nodes": 2})))
    assert "--nodes=2" in only
    assert "--ntasks-per-node=2" in only


def test_no_signal() -> None:
    assert "--signal" not in render(plain(slurm={"signal_s": 0}))


@pytest.mark.parametrize(
    ("gres", "option"),
    [
        ("gpu:4", "--gpus-per-node=4"),
        ("gpu:a100:2", "--gpus-per-node=a100:2"),
        ("gpu", "--gpus-per-node=1"),
        ("gpu:a100:1,gpu:v100:1", "--gpus-per-node=a100:1,v100:1"),
    ],
)
def test_a_site_that_refuses_gres(gres: str, option: str) -> None:
    submission = replace(plain(decode={"gres": gres}), site=Site(rejects=("gres",)))
    script = render(submission)
    assert "--gres" not in script
    assert option in directives(script)[1]


def test_a_site_that_refuses_more() -> None:
    wanted = plain(decode={"gres": "gpu:1"}, slurm={"exclusive": True, "segment": 2, "mem": "0"})
    both = directives(render(wanted))[1]
    assert {"--gres=gpu:1", "--exclusive", "--segment=2", "--mem=0"} <= set(both)
    site = Site(rejects=("gres", "gpus-per-node", "exclusive", "segment", "mem"))
    none = directives(render(replace(wanted, site=site)))[1]
    assert none == ["--signal=B:USR1@300", "--nodes=1", "--ntasks-per-node=1"]


@pytest.mark.parametrize(
    ("submission", "words"),
    [
        (plain(orchestrator={"api_key": "secret"}), "orchestrator.api_key: would stand in"),
        (plain(slurm={"account": "a\nrm -rf"}), "holds a control character"),
        (
            replace(plain(decode={"gres": "gpu:1,nvme:1"}), site=Site(rejects=("gres",))),
            "decode.gres = 'gpu:1,nvme:1': has more than GPUs",
        ),
    ],
)
def test_what_is_not_submitted(submission: Submission, words: str) -> None:
    with pytest.raises(JobError) as caught:
        render(submission)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_percent_sign_in_the_folder_is_no_pattern() -> None:
    script = render(replace(plain(), runs=Path("/a%j b")))
    assert "#SBATCH --output='/a%%j b/%x-%j.out'" in script
    assert "folder='/a%j b/small'-$SLURM_JOB_ID" in script


def test_the_script_makes_the_run_folder_and_starts_the_command(tmp_path: Path) -> None:
    program = tmp_path / "my rdma-kv"
    program.write_text(
        '#!/bin/sh\nfor word; do echo "$word"; done; echo "$HF_HOME|$MODEL_NAME|$A"\n'
    )
    program.chmod(0o755)
    setup = {"slurm": {"setup": ["export A='x y'"], "mpi": "pmix"}}
    submission = replace(
        plain(**setup),
        runs=tmp_path / "runs folder",
        program=(str(program),),
        arguments=("--set", "a.b=$HOME"),
        site=Site(model_cache="~/h f"),
    )
    env = {"PATH": os.environ["PATH"], "HOME": "/h", "SLURM_JOB_ID": "5", "MODEL_NAME": "other"}
    for restarts in ("", "1"):
        done = subprocess.run(
            ["bash"],
            input=render(submission),
            env={**env, "SLURM_RESTART_COUNT": restarts},
            check=True,
            capture_output=True,
            text=True,
        )
        run = tmp_path / "runs folder" / "small-5" / f"attempt-{restarts or 0}"
        words = [
            "serve",
            "--set",
            "a.b=$HOME",
            "--config",
            f"{run}/job.yaml",
            "--run-dir",
            f"{run}",
        ]
        assert done.stdout.splitlines() == [*words, "/h/h f||x y"]
        assert (run.parent / "latest").resolve() == run
        assert load_job(run / "job.yaml", {}) == submission.job
        assert run.stat().st_mode & 0o777 == 0o700
        assert (run / "job.yaml").stat().st_mode & 0o777 == 0o600


def test_a_set_up_line_that_fails_ends_the_job() -> None:
    submission = replace(plain(slurm={"setup": ["false"]}), runs=Path("/dev/null/no"))
    assert subprocess.run(["bash"], input=render(submission), check=False, text=True).returncode


@pytest.mark.parametrize(
    ("text", "name"),
    [("llama-3.1-8b", "llama-3.1-8b"), ("my job/1", "my-job-1"), ("..", "job"), ("é", "job"),
     ("x" * 99, "x" * 64)],
)  # fmt: skip
def test_job_names(text: str, name: str) -> None:
    assert job_name(text) == name
