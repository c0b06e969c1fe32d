# SPDX-License-Identifier: Apache-2.0
"""From a job to the components that Slurm is asked for.

Component 0 runs the orchestrator (rank 0) and the prefill engines, component 1 the decode engines;
with `slurm.one_component` a single one runs all, split by rank in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rdma_kv_cache.config import JobError, Problem
from rdma_kv_cache.slurm import time_limit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rdma_kv_cache.config import EngineGroup, JobConfig, Role

ROLES: tuple[Role, Role] = ("prefill", "decode")


@dataclass(frozen=True)
class ComponentPlan:
    """What one component is asked for. `tasks` are MPI ranks."""

    role: Literal["prefill", "decode", "any"]
    nodes: int
    tasks: int
    constraint: str | None = None
    gres: str | None = None

    @property
    def tasks_per_node(self) -> int:
        """The most ranks that one node runs. Every node is asked to have room for so many.

        Asked for --ntasks alone, Slurm may fill the first nodes and starve the last; with room
        everywhere srun spreads the ranks evenly.
        """
        return -(-self.tasks // self.nodes)


def plan(job: JobConfig) -> tuple[ComponentPlan, ...]:
    """Return the components of `job`. Raises JobError naming everything that does not fit."""
    problems = [*_time_problems(job)]
    if job.slurm.one_component:
        problems += _likeness_problems(job)
        components: tuple[ComponentPlan, ...] = (_whole(job),)
    else:
        if job.slurm.nodes is not None:
            problems.append(
                _problem(
                    "slurm.nodes",
                    job.slurm.nodes,
                    "is only for a job of one component",
                    "Set slurm.one_component, or say prefill.nodes and decode.nodes",
                )
            )
        components = tuple(_component(role, job.group(role), role == "prefill") for role in ROLES)
    for component in components:
        problems += _size_problems(job, component)
    if problems:
        raise JobError(problems)
    return components


def gpus_in(gres: str | None) -> int | None:
    """Return the GPUs of one node in a --gres value (`gpu:a100:4,nvme`); None if it names none."""
    counts = []
    for entry in (gres or "").split(","):
        kind, *more = entry.strip().removeprefix("gres/").partition("(")[0].split(":")
        if kind == "gpu":
            counts.append(int(more[-1]) if more and more[-1].isdigit() else 1)
    return sum(counts) if counts else None


def _component(role: Role, group: EngineGroup, is_first: bool) -> ComponentPlan:
    return ComponentPlan(role, group.nodes, group.engines + is_first, group.constraint, group.gres)


def _whole(job: JobConfig) -> ComponentPlan:
    nodes = job.slurm.nodes or job.prefill.nodes + job.decode.nodes
    constraint = job.prefill.constraint or job.decode.constraint
    gres = job.prefill.gres or job.decode.gres
    return ComponentPlan("any", nodes, job.world_size, constraint, gres)


def _likeness_problems(job: JobConfig) -> Iterable[Problem]:
    for name in ("constraint", "gres"):
        ours, theirs = getattr(job.prefill, name), getattr(job.decode, name)
        if ours and theirs and ours != theirs:
            yield _problem(
                f"decode.{name}",
                theirs,
                f"differs from prefill.{name} = {ours!r}, but all nodes of a job of one component "
                "are alike",
                f"Say {name} once, or leave slurm.one_component out",
            )


def _size_problems(job: JobConfig, component: ComponentPlan) -> Iterable[Problem]:
    """Find what would leave nodes idle or engines without GPUs, before the job waits in a queue."""
    if component.role == "any":
        engines = job.world_size - 1
        key = "slurm.nodes" if job.slurm.nodes else "prefill.nodes + decode.nodes"
    else:
        engines = job.group(component.role).engines
        key = f"{component.role}.nodes"
    if engines < component.nodes:
        yield _problem(
            key,
            component.nodes,
            f"are more nodes than the {engines} engine(s) that run there",
            "Ask for fewer nodes, or for more engines",
        )
        return
    gpus = gpus_in(component.gres)
    if gpus is None or _gpus_are_chosen(job, component):
        return
    on_a_node = _most_engines_on_a_node(component, engines)
    roles = ROLES if component.role == "any" else (component.role,)
    each = max(job.tp_size(role) for role in roles)
    if on_a_node * each > gpus:
        role = "prefill" if component.role == "any" else component.role
        yield _problem(
            f"{role}.gres",
            component.gres,
            f"gives a node {gpus} GPU(s), but up to {on_a_node} engine(s) of {each} GPU(s) run on "
            "one",
            "Ask for more GPUs or nodes, for fewer engines or a smaller tensor_parallel_size",
        )


def _most_engines_on_a_node(component: ComponentPlan, engines: int) -> int:
    share, rest = divmod(component.tasks, component.nodes)
    ranks = [share + (node < rest) for node in range(component.nodes)]
    ranks[0] -= component.tasks - engines  # the orchestrator
    return max(ranks)


def _gpus_are_chosen(job: JobConfig, component: ComponentPlan) -> bool:
    roles = ROLES if component.role == "any" else (component.role,)
    return any("CUDA_VISIBLE_DEVICES" in job.group(role).env for role in roles)


def _time_problems(job: JobConfig) -> Iterable[Problem]:
    if job.slurm.time is None or not job.slurm.signal_s:
        return
    if time_limit.seconds(job.slurm.time) <= job.slurm.signal_s:
        yield _problem(
            "slurm.signal_s",
            job.slurm.signal_s,
            f"is not shorter than slurm.time = {job.slurm.time!r}: the job would drain at once",
            "Ask for more time, or lower slurm.signal_s",
        )


def _problem(key: str, value: object, message: str, remedy: str) -> Problem:
    return Problem("this job", key, message, remedy, value)
