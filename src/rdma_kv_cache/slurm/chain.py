# SPDX-License-Identifier: Apache-2.0
"""A serving job that submits its successor before its own time is up.

The successor publishes itself when it is READY; only then the old job hands over: its orchestrator
sends new requests on while those in flight are answered, and after a while it ends.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from rdma_kv_cache.slurm import records
from rdma_kv_cache.slurm.environment import outside
from rdma_kv_cache.slurm.programs import SlurmError, run
from rdma_kv_cache.slurm.service import Current
from rdma_kv_cache.slurm.submit import job_id_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rdma_kv_cache.slurm.environment import Allocation
    from rdma_kv_cache.slurm.service import Service


@dataclass
class Link:
    """This job's place in the chain. `length`: how many jobs may follow the first one."""

    service: Service
    here: Allocation
    run_dir: Path
    length: int
    generation: int = 0
    successor: int | None = None

    def publish(self, url: str) -> None:
        """This job is READY: the service moves here. Raises OSError."""
        before = self.service.current()
        self.generation = 0 if before is None else before.generation + 1
        current = Current(self.here.job_id, url, str(self.run_dir), self.generation)
        self.service.publish(current)

    def moved_to(self) -> Current | None:
        """Return the job that has taken the service over from this one."""
        current = self.service.current()
        return None if current is None or current.job_id == self.here.job_id else current

    def submit_successor(self, env: Mapping[str, str] = os.environ) -> int | None:
        """Submit this job's own script once more; None if the chain has its length.

        Raises SlurmError, OSError.
        """
        if self.generation >= self.length:
            return None
        folder = self.run_dir.parent
        script = folder / records.SCRIPT_FILE
        record = records.read(folder)
        if record is None or not script.is_file():
            raise SlurmError(f"{folder} has no {records.RECORD_FILE} or {records.SCRIPT_FILE}")
        job_id = job_id_of(run(["sbatch", "--parsable", str(script)], outside(env)))
        following = records.job_folder(folder.parent, record.name, job_id)
        successor = msgspec.structs.replace(
            record,
            job_id=job_id,
            folder=str(following),
            submitted=time.time(),
            via="sbatch",
            predecessor=self.here.job_id,
        )
        records.write(successor)
        (following / records.SCRIPT_FILE).write_bytes(script.read_bytes())
        self.successor = job_id
        return job_id
