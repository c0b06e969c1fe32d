# SPDX-License-Identifier: Apache-2.0
"""Which rank is what: 0 the orchestrator, then the prefill engines, then the decode engines."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rdma_kv_cache.config import JobConfig

RankRole = Literal["orchestrator", "prefill", "decode"]
ORCHESTRATOR: Literal["orchestrator"] = "orchestrator"


@dataclass(frozen=True)
class Place:
    """A rank's role and the name of its engine (rank 0: "orchestrator")."""

    role: RankRole
    engine: str


def place_of(rank: int, job: JobConfig) -> Place:
    """Return the place of MPI rank `rank`. Raises ValueError outside 0..world_size-1."""
    if not 0 <= rank < job.world_size:
        raise ValueError(f"rank {rank} of a job of {job.world_size} ranks")
    if rank == 0:
        return Place(ORCHESTRATOR, ORCHESTRATOR)
    if rank <= job.prefill.engines:
        return Place("prefill", job.engine_names("prefill")[rank - 1])
    return Place("decode", job.engine_names("decode")[rank - 1 - job.prefill.engines])


def tp_size_of(place: Place, job: JobConfig) -> int:
    """Return the TP ranks of the engine at `place`; 1 for the orchestrator, which has none."""
    if place.role == ORCHESTRATOR:
        return 1
    return job.tp_size("prefill" if place.role == "prefill" else "decode")


def new_incarnation() -> int:
    """Return a random non-zero number for one life of an engine.

    63 bits, so that no reader of the JSON status takes it for a negative number.
    """
    return secrets.randbelow(2**63 - 1) + 1
