# SPDX-License-Identifier: Apache-2.0
"""The command line that starts a job's ranks: on this machine, or over a Slurm allocation.

Slurm numbers the nodes of a step over several components by name and its ranks by component, so
that a PMI tells MPI a wrong node map wherever the names sort otherwise (seen with 22.05 and 26.05).
With srun MPI must therefore take each rank for a node of its own (MPIR_CVAR_NOLOCAL), and PMI2's
tree must have no inner nodes. mpiexec that starts its proxies by srun has a right map of its own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rdma_kv_cache.cluster import guardian
from rdma_kv_cache.cluster.gpus import FIRST_NODE_VARIABLE
from rdma_kv_cache.cluster.roles import place_of
from rdma_kv_cache.slurm.container import contain
from rdma_kv_cache.slurm.environment import allocation
from rdma_kv_cache.slurm.site import load_site

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdma_kv_cache.config import JobConfig
    from rdma_kv_cache.slurm.environment import Allocation

SRUN_SHIM = "srun-ssh"
DEFAULT_MPI = "pmi2"
"""Of MPICH, which the lock file brings."""
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")  # fmt: skip


class ClusterError(RuntimeError):
    """The ranks could not be started, or the run failed; the text says why."""


@dataclass(frozen=True)
class Launch:
    """A launcher's command line, and what it needs beside the environment of this process.

    `files` are to be written into the run folder, executable; `unset` are variables that must not
    reach it.
    """

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """The ranks that one component of an allocation runs, in rank order, and its nodes."""

    role: str
    tasks: int
    nodes: tuple[str, ...]

    def tasks_by_node(self) -> list[tuple[str, int]]:
        """How many ranks each node gets: alike, and the first ones one more."""
        share, rest = divmod(self.tasks, len(self.nodes))
        counts = [share + (index < rest) for index in range(len(self.nodes))]
        return [(node, n) for node, n in zip(self.nodes, counts, strict=True) if n]


def choose(
    job: JobConfig, arguments: Sequence[str], folder: Path, env: Mapping[str, str]
) -> Launch:
    """Return how to start the ranks (`rdma-kv` with `arguments`) where this runs.

    `folder` is the run folder, which every node sees. Raises ClusterError, and JobError for a
    wrong site file.
    """
    program = [sys.executable, "-m", "rdma_kv_cache.cli", *arguments]
    here = allocation(env)
    if here is None:
        return local_launch(job.world_size, program)
    site = load_site(env)
    options: Sequence[str] = ()
    if site.container != "none":
        model = Path(job.model.name)
        folders = [folder, *([model] if model.is_absolute() else [])]
        inside = contain(site, ["rdma-kv", *arguments], folders)
        program, options = list(inside.command), inside.srun_options
    if job.slurm.launcher == "srun":
        return srun_launch(job, here, program, options)
    if options:
        raise ClusterError(
            f"site.container {site.container} needs slurm.launcher srun: its options are srun's"
        )
    return mpiexec_launch(job, here, program, folder)


def local_launch(ranks: int, program: Sequence[str]) -> Launch:
    """Start `ranks` ranks on this machine. Raises ClusterError without an mpiexec.

    -disable-auto-cleanup: a rank that dies must not take the others with it (MPICH ends them all
    by default). -launcher fork: no ssh, and not the nodes of a Slurm job that this may run in.
    Each rank has a guardian, see there.
    """
    options = ["-launcher", "fork", "-disable-auto-cleanup", "-prepend-rank", "-n", str(ranks)]
    return Launch([find_mpiexec(), *options, *guardian.guarded(program, parent=0)])


def groups_of(job: JobConfig, allocation: Allocation) -> list[Group]:
    """Say which ranks each component runs. Raises ClusterError if they do not fit it."""
    roles = Counter("prefill" if r == 0 else place_of(r, job).role for r in range(job.world_size))
    names = [component.nodes for component in allocation.components]
    if len(names) == 1:
        groups = [Group("any", job.world_size, names[0])]
    elif len(names) == 2:
        groups = [Group(role, roles[role], nodes) for role, nodes in zip(roles, names, strict=True)]
    else:
        raise ClusterError(
            f"job {allocation.job_id} has {len(names)} components; one for all engines or two, "
            "prefill and decode, can be used"
        )
    for group in groups:
        if group.tasks < len(group.nodes):
            raise ClusterError(
                f"{len(group.nodes)} nodes ({', '.join(group.nodes)}) for {group.tasks} "
                f"{group.role} ranks: some would do nothing; ask for fewer nodes or more engines"
            )
    return groups


def srun_launch(
    job: JobConfig, allocation: Allocation, program: Sequence[str], options: Sequence[str] = ()
) -> Launch:
    """Start the ranks with srun and Slurm's own PMI.

    -K0, -W0: a rank's end must not end the others, whatever the site's defaults are.
    """
    srun = _find("srun")
    groups = groups_of(job, allocation)
    common = ["--kill-on-bad-exit=0", "--wait=0", "--label", "--unbuffered"]
    command = [srun, f"--mpi={job.slurm.mpi or DEFAULT_MPI}", *common]
    for index, group in enumerate(groups):
        step = [*options, f"--nodes={len(group.nodes)}", f"--ntasks={group.tasks}"]
        if len(groups) > 1:
            step.insert(0, f"--het-group={index}")
        command += [*([":"] if index else []), *step, *_with_role(group, program)]
    nodes = sum(len(group.nodes) for group in groups)
    # Ranks per node are the allocation's room, not a wish: srun would only warn of it.
    unset = [name for name in os.environ if name.startswith("SLURM_NTASKS_PER_NODE")]
    environment = {
        **_mpi_environment(), "MPIR_CVAR_NOLOCAL": "1", "SLURM_PMI2_TREE_WIDTH": str(nodes + 1),
    }  # fmt: skip
    return Launch(command, environment, tuple(unset))


def mpiexec_launch(
    job: JobConfig, allocation: Allocation, program: Sequence[str], folder: Path
) -> Launch:
    """Start the ranks with this MPI's own mpiexec, and its proxies with srun.

    For sites whose srun has no PMI that this MPI understands. `folder` is where the files go.
    """
    _find("srun")
    groups = groups_of(job, allocation)
    hosts = [f"{node}:{n}" for group in groups for node, n in group.tasks_by_node()]
    command = [find_mpiexec(), "-launcher", "ssh", "-launcher-exec", str(folder / SRUN_SHIM)]
    command += ["-disable-auto-cleanup", "-prepend-rank", "-hosts", ",".join(hosts)]
    for index, group in enumerate(groups):
        guarded = guardian.guarded(program, parent=0)
        command += [*([":"] if index else []), "-n", str(group.tasks), *_with_role(group, guarded)]
    # mpiexec would give every node the GPUs of this one.
    environment = _mpi_environment()
    if own_gpus := os.environ.get(GPU_VARIABLES[0]):
        environment[FIRST_NODE_VARIABLE] = own_gpus
    return Launch(command, environment, GPU_VARIABLES, {SRUN_SHIM: srun_shim(groups)})


def srun_shim(groups: Sequence[Group]) -> str:
    """Return the script that is an ssh to mpiexec, and starts the command by srun.

    Within a heterogeneous job srun reaches only the component that it is told.
    """
    cases = ""
    if len(groups) > 1:
        cases = "".join(
            f"  {'|'.join(map(shlex.quote, group.nodes))}) component=--het-group={index} ;;\n"
            for index, group in enumerate(groups)
        )
        cases = f'case "$host" in\n{cases}esac\n'
    return f"""#!/bin/sh
# {SRUN_SHIM} [ssh options] HOST COMMAND...: what mpiexec takes for ssh.
while true; do
  case $1 in
    -[pliFoJ]) shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
host=$1
shift
component=
{cases}# shellcheck disable=SC2086
exec srun $component --overlap --mpi=none --nodes=1 --ntasks=1 --nodelist="$host" \\
  --unbuffered sh -c "$*" </dev/null
"""


def find_mpiexec() -> str:
    """Return the mpiexec beside this python, else the one on PATH. Raises ClusterError.

    The one beside it comes first: the `mpich` wheel brings launcher and library together, and a
    launcher of another MPI starts worlds of one rank each.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.is_file() else shutil.which("mpiexec")
    if found is None:
        raise ClusterError(
            f"no mpiexec beside {sys.executable} nor on PATH: pip install 'rdma-kv-cache[mpich]'"
        )
    return found


def environment_for(launch: Launch, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the launcher."""
    kept = {name: value for name, value in base.items() if name not in launch.unset}
    return {**kept, **launch.environment}


def _mpi_environment() -> dict[str, str]:
    """MPI serves the set-up alone: plain TCP does, and is there on every cluster.

    MPICH's other netmod, UCX, has addresses so long that Slurm's PMI2 sometimes cuts one off in
    the middle ("value not properly terminated in client request", 2 of 10 starts on 22.05).
    """
    wanted = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _with_role(group: Group, program: Sequence[str]) -> list[str]:
    return ["env", f"ROLE={group.role}", *program] if group.role != "any" else [*program]


def _find(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise ClusterError(
            f"no {program} on PATH, but this runs inside a Slurm allocation: load Slurm's module, or "
            "start outside the allocation (unset SLURM_JOB_ID)"
        )
    return found
