# SPDX-License-Identifier: Apache-2.0
"""What submitit runs on the first node of a job: one of our commands, in the batch script."""

from __future__ import annotations

import os
from dataclasses import dataclass


class CommandFailed(RuntimeError):
    """The command ended with another exit code than 0, so that the job is FAILED."""


@dataclass(frozen=True)
class Command:
    """`rdma-kv KIND ARGUMENTS…` on the job that the batch script has put in the run folder."""

    kind: str
    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Run the command and return 0. Raises CommandFailed."""
        from rdma_kv_cache.cli.main import main
        from rdma_kv_cache.slurm.script import RUN_VARIABLE

        run = os.environ[RUN_VARIABLE]
        words = [self.kind, *self.arguments, "--config", f"{run}/job.yaml", "--run-dir", run]
        try:
            main(words, prog_name="rdma-kv")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise CommandFailed(f"rdma-kv {self.kind}: exit code {end.code}") from None
        return 0
