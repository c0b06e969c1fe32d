# SPDX-License-Identifier: Apache-2.0
"""Jobs that follow each other, each submitted by the one before.

A job submits its successor when it starts: Slurm holds that one until the job has ended, and drops
it if the job ended well. So it does not matter what the job ends of: a lost node, preemption and
the time limit are alike.

A serving job lets its successor go before its own time is up. That one publishes itself when it is
READY; only then the old job hands over: its orchestrator sends new requests on while those in
flight are answered, and after a while it ends.
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
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rdma_kv_cache.slurm.environment import Allocation
    from rdma_kv_cache.slurm.records import Record
    from rdma_kv_cache.slurm.service import Service


@dataclass(frozen=True)
class Link:
    """This job's place in a chain. `length`: how many jobs may follow the first one."""

    here: Allocation
    record: Record
    length: int

    @property
    def generation(self) -> int:
        """How many jobs came before this one."""
        count, record = 0, self.record
        while record.predecessor is not None and count < self.length:
            count += 1
            folder = records.job_folder(record.path.parent, record.name, record.predecessor)
            before = records.read(folder)
            if before is None:
                break
            record = before
        return count

    def submit_successor(
        self, options: Sequence[str] = (), env: Mapping[str, str] = os.environ
    ) -> int | None:
        """Submit this job's own script once more; None if the chain has its length.

        `options` are sbatch's. Raises SlurmError, OSError.
        """
        if self.generation >= self.length:
            return None
        script = self.record.path / records.SCRIPT_FILE
        if not script.is_file():
            raise SlurmError(f"there is no {script}: only a submitted job has a script")
        said = run(["sbatch", "--parsable", *options, str(script)], outside(env))
        job_id = job_id_of(said)
        following = records.job_folder(self.record.path.parent, self.record.name, job_id)
        successor = msgspec.structs.replace(
            self.record,
            job_id=job_id,
            folder=str(following),
            submitted=time.time(),
            via="sbatch",
            predecessor=self.here.job_id,
        )
        records.write(successor)
        (following / records.SCRIPT_FILE).write_bytes(script.read_bytes())
        return job_id

    def submit_fallback(self) -> int | None:
        """Submit a successor that starts only if this job fails. Raises SlurmError, OSError."""
        dependency = f"--dependency=afternotok:{self.here.job_id}"
        return self.submit_successor([dependency, "--kill-on-invalid-dep=yes"])


def release_fallback(job_id: int) -> None:
    """Let a successor start now, whatever becomes of this job. Raises SlurmError."""
    run(["scontrol", "update", f"jobid={job_id}", "dependency="])


def drop_fallback(job_id: int) -> None:
    """Cancel a successor that is not needed. Raises SlurmError."""
    run(["scancel", str(job_id)])


@dataclass(frozen=True)
class Handover:
    """A serving job's part of it: `service` is what clients know."""

    link: Link
    service: Service
    run_dir: Path
    fallback: int | None = None
    """The successor that waits."""

    def publish(self, url: str) -> None:
        """This job is READY: the service moves here. Raises OSError."""
        job_id, run_dir = self.link.here.job_id, str(self.run_dir)
        self.service.publish(Current(job_id, url, run_dir, self.link.generation))

    def moved_to(self) -> Current | None:
        """Return the job that has taken the service over from this one."""
        current = self.service.current()
        is_own = current is None or current.job_id == self.link.here.job_id
        return None if is_own else current
