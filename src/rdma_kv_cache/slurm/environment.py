# SPDX-License-Identifier: Apache-2.0
"""What a process finds of its Slurm job in its environment. SLURM_* are read here and only here.

Slurm gives a step of several components one node list, sorted by name; only the lists of the
components say which node belongs to which (seen with 22.05 and 26.05).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdma_kv_cache.slurm import hostlist

if TYPE_CHECKING:
    from collections.abc import Mapping

# Where Slurm is, and nothing of the job that this runs in.
_OF_THE_SITE = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS"})
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMI2_", "PMIX_", "HYDRA_", "MPIR_CVAR_")


@dataclass(frozen=True)
class Component:
    """One component of an allocation; a plain job has one."""

    nodes: tuple[str, ...]
    """In Slurm's order within the component."""


@dataclass(frozen=True)
class Allocation:
    """The job that this process runs in."""

    job_id: int
    """Of the leader, in a heterogeneous job."""
    components: tuple[Component, ...]
    job_name: str = ""
    restart_count: int = 0
    """How often Slurm has requeued the job."""


def allocation(env: Mapping[str, str]) -> Allocation | None:
    """Return the Slurm job of this environment; None outside of one.

    Raises ValueError naming the variable that is missing or malformed.
    """
    if not env.get("SLURM_JOB_ID"):
        return None
    het_size = _number(env, "SLURM_HET_SIZE", 0)
    if het_size:
        lists = [f"SLURM_JOB_NODELIST_HET_GROUP_{index}" for index in range(het_size)]
    else:
        lists = ["SLURM_JOB_NODELIST"]
    return Allocation(
        job_id=_number(env, "SLURM_JOB_ID", 0),
        components=tuple(Component(_nodes(env, name)) for name in lists),
        job_name=env.get("SLURM_JOB_NAME", ""),
        restart_count=_number(env, "SLURM_RESTART_COUNT", 0),
    )


def outside(env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` without what a job and its MPI put there, for submitting another from inside.

    Else sbatch hands it on, and the new job takes the old one's nodes for its own.
    """
    return {
        name: value
        for name, value in env.items()
        if name in _OF_THE_SITE or not name.startswith(_OF_A_JOB)
    }


def _nodes(env: Mapping[str, str], variable: str) -> tuple[str, ...]:
    try:
        names = hostlist.expand(env.get(variable, ""))
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from error
    if not names:
        raise ValueError(
            f"{variable} is not set, though SLURM_JOB_ID={env.get('SLURM_JOB_ID')} is: start this "
            "in the batch script, or outside of the job (unset SLURM_JOB_ID)"
        )
    return tuple(names)


def _number(env: Mapping[str, str], variable: str, default: int) -> int:
    text = env.get(variable) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{variable}={text!r} is not a number") from None
