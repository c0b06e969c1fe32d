# SPDX-License-Identifier: Apache-2.0
"""What a process learns of its Slurm job."""

from __future__ import annotations

import pytest

from rdma_kv_cache.slurm.environment import allocation, outside

# As seen in the batch script of a heterogeneous job (Slurm 22.05).
HET = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "serve",
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST": "p0",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "p0",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "d[0-1]",
}


def test_outside_of_a_job() -> None:
    assert allocation({}) is None
    assert allocation({"SLURM_CONF": "/etc/slurm.conf", "SLURM_JOB_ID": ""}) is None


def test_a_heterogeneous_job() -> None:
    found = allocation(HET)
    assert found is not None
    assert found.job_id == 17
    assert found.job_name == "serve"
    assert [component.nodes for component in found.components] == [("p0",), ("d0", "d1")]
    assert found.restart_count == 0


def test_a_step_sorts_its_nodes_but_not_the_components() -> None:
    found = allocation({**HET, "SLURM_JOB_NODELIST": "d[0-1],p0"})
    assert found is not None
    assert found.components[0].nodes == ("p0",)


def test_a_plain_job() -> None:
    env = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "2"}
    found = allocation(env)
    assert found is not None
    assert [component.nodes for component in found.components] == [("n1", "n2")]
    assert found.restart_count == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_JOB_NODELIST_HET_GROUP_1": ""}, "SLURM_JOB_NODELIST_HET_GROUP_1 is not set"),
        ({"SLURM_JOB_NODELIST_HET_GROUP_0": "p["}, "SLURM_JOB_NODELIST_HET_GROUP_0: host list"),
        ({"SLURM_HET_SIZE": "two"}, "SLURM_HET_SIZE='two' is not a number"),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' is not a number"),
    ],
)
def test_a_wrong_variable_is_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        allocation({**HET, **change})


def test_a_successor_gets_nothing_of_the_job() -> None:
    kept = {"HOME": "/home/u", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "a"}
    of_the_job = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "p0", "PMI_RANK": "0", "SRUN_DEBUG": "3"}
    assert outside({**kept, **HET, **of_the_job}) == kept
