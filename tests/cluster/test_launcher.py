# SPDX-License-Identifier: Apache-2.0
"""The launchers' command lines; tests/slurm runs them."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from rdma_kv_cache.cluster import launcher
from rdma_kv_cache.cluster.launcher import ClusterError, Group
from rdma_kv_cache.config import JobConfig
from rdma_kv_cache.slurm.environment import Allocation, Component

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = ["rank", "--run-dir", "/runs/a b"]
HET = Allocation(7, (Component(("p0", "p1")), Component(("d0",))))
PLAIN = Allocation(7, (Component(("n0", "n1")),))


def job(prefill: int = 2, decode: int = 1, **slurm: str) -> JobConfig:
    return JobConfig.model_validate(
        {
            "model": {"name": "m"},
            "prefill": {"engines": prefill},
            "decode": {"engines": decode},
            "slurm": slurm,
        }
    )


@pytest.fixture(autouse=True)
def _srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An srun that says how it was called."""
    fake = tmp_path / "bin" / "srun"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")


def test_srun_over_two_components() -> None:
    launch = launcher.srun_launch(job(), HET, PROGRAM)
    assert launch.command[1:] == [
        "--mpi=pmi2", "--kill-on-bad-exit=0", "--wait=0", "--label", "--unbuffered",
        "--het-group=0", "--nodes=2", "--ntasks=3", "env", "ROLE=prefill", *PROGRAM, ":",
        "--het-group=1", "--nodes=1", "--ntasks=1", "env", "ROLE=decode", *PROGRAM,
    ]  # fmt: skip
    assert launch.environment["MPIR_CVAR_NOLOCAL"] == "1"
    assert launch.environment["SLURM_PMI2_TREE_WIDTH"] == "4"


def test_srun_over_one_component_splits_by_rank() -> None:
    command = launcher.srun_launch(job(mpi="pmix"), PLAIN, PROGRAM).command
    assert command[1] == "--mpi=pmix"
    assert command[-5:] == ["--nodes=2", "--ntasks=4", *PROGRAM]


def test_first_nodes_get_the_ranks_that_do_not_divide() -> None:
    assert Group("any", 5, ("a", "b", "c")).tasks_by_node() == [("a", 2), ("b", 2), ("c", 1)]


def test_mpiexec_keeps_the_gpus_of_this_node_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    launch = launcher.mpiexec_launch(job(), HET, PROGRAM, tmp_path)
    assert launch.command[launch.command.index("-hosts") + 1] == "p0:2,p1:1,d0:1"
    environment = launcher.environment_for(launch, os.environ)
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert environment["RDMA_KV_FIRST_NODE_GPUS"] == "0,1"


@pytest.mark.parametrize(
    ("host", "component"), [("p1", ["--het-group=0"]), ("d0", ["--het-group=1"])]
)
def test_shim_starts_the_command_in_the_component_of_the_host(
    tmp_path: Path, host: str, component: list[str]
) -> None:
    shim = tmp_path / launcher.SRUN_SHIM
    shim.write_text(launcher.srun_shim(launcher.groups_of(job(), HET)))
    said = subprocess.run(
        ["sh", str(shim), "-x", "-l", "user", host, '"/proxy"', "--port", "x:1"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert said == [
        *component, "--overlap", "--mpi=none", "--nodes=1", "--ntasks=1", f"--nodelist={host}",
        "--unbuffered", "sh", "-c", '"/proxy" --port x:1',
    ]  # fmt: skip


def test_shim_of_a_plain_job_names_no_component() -> None:
    assert "--het-group" not in launcher.srun_shim([Group("any", 4, ("n0", "n1"))])


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"2 nodes \(d0, d1\) for 1 decode ranks"):
        launcher.groups_of(job(), Allocation(7, (Component(("p0",)), Component(("d0", "d1")))))
    with pytest.raises(ClusterError, match="job 7 has 3 components"):
        launcher.groups_of(job(), Allocation(7, (Component(("p0",)),) * 3))
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClusterError, match="no srun on PATH"):
        launcher.srun_launch(job(), HET, PROGRAM)


def test_outside_of_slurm_the_ranks_run_here(tmp_path: Path) -> None:
    command = launcher.choose(job(), ["rank"], tmp_path, {}).command
    assert command[1:3] == ["-launcher", "fork"]
    inside = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]"}
    assert "--ntasks=4" in launcher.choose(job(), ["rank"], tmp_path, inside).command
