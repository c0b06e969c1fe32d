# SPDX-License-Identifier: Apache-2.0
"""Which GPUs of its host an engine uses: the engines of a host share them out in rank order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rdma_kv_cache.config import JobError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdma_kv_cache.config import JobConfig, Role
    from rdma_kv_cache.protocol.bootstrap import EngineHello

VARIABLE = "CUDA_VISIBLE_DEVICES"
FIRST_NODE_VARIABLE = "RDMA_KV_FIRST_NODE_GPUS"
"""What mpiexec, started through srun, must keep from the other nodes."""
DRIVER = Path("/proc/driver/nvidia/gpus")


def visible_gpus(env: Mapping[str, str], driver: Path = DRIVER) -> list[str]:
    """Return the GPUs that this process may use: what Slurm or the user says, else all.

    Names as CUDA_VISIBLE_DEVICES takes them: indices or UUIDs.
    """
    given = env.get(VARIABLE, env.get(FIRST_NODE_VARIABLE))
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    try:
        return [str(index) for index, _ in enumerate(driver.iterdir())]
    except OSError:
        return []


def gpus_of_engine(
    hello: EngineHello, hellos: Sequence[EngineHello], job: JobConfig, visible: Sequence[str]
) -> list[str]:
    """Return the engine's share of `visible`; empty where there is no GPU or its `env` chooses.

    Raises JobError if the engines of this host need more GPUs than there are.
    """
    role: Role = "prefill" if hello.role == "prefill" else "decode"
    if not visible or VARIABLE in job.group(role).env:
        return []
    here = [h for h in hellos if h.host == hello.host and h.role in ("prefill", "decode")]
    needed = sum(h.tp_size for h in here)
    if needed > len(visible):
        each = ", ".join(f"{h.engine} ({h.tp_size})" for h in here)
        message = (
            f"host {hello.host} has {len(visible)} GPU(s) for this job ({','.join(visible)}), but "
            f"its engines need {needed}: {each}"
        )
        remedy = (
            "Ask for more GPUs (gres) or nodes, fewer engines or a smaller tensor_parallel_size; "
            f"engines that shall share a GPU name it themselves (env: {{{VARIABLE}: ...}})"
        )
        raise JobError([Problem("GPUs", "", message, remedy)])
    before = here[: [h.engine for h in here].index(hello.engine)]
    first = sum(h.tp_size for h in before)
    return list(visible[first : first + hello.tp_size])


def gpus_to_show(
    own: Sequence[str], hello: EngineHello, hellos: Sequence[EngineHello], visible: Sequence[str]
) -> list[str]:
    """Return what CUDA shall show an engine's vLLM: its own GPUs first, which are those it takes.

    Where both roles are on this host the others follow: memory of a GPU that a process does not
    see cannot be mapped into it (cuIpcOpenMemHandle), and KV would go another way.
    """
    other_role = "decode" if hello.role == "prefill" else "prefill"
    if not own or all(h.host != hello.host or h.role != other_role for h in hellos):
        return list(own)
    return [*own, *(name for name in visible if name not in own)]
