# SPDX-License-Identifier: Apache-2.0
"""Jobs, MPI worlds of small programs, and waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import rdma_kv_cache
from rdma_kv_cache.cluster.launcher import local_launch
from rdma_kv_cache.config import JobConfig, dump_job

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
SOURCE = Path(rdma_kv_cache.__file__).parent.parent
STANDIN = HERE / "standin"


def make_job(**sections: dict[str, Any]) -> JobConfig:
    """A job of one prefill and one decode engine, quick to notice faults."""
    values: dict[str, Any] = {
        "model": {"name": "test/model"},
        "orchestrator": {
            "heartbeat_s": 0.1,
            "health_timeout_s": 2.0,
            "engine_start_timeout_s": 30.0,
            **sections.pop("orchestrator", {}),
        },
        **sections,
    }
    return JobConfig.model_validate(values)


def python_path(*folders: Path) -> str:
    """PYTHONPATH with `folders` first, then this package's source."""
    return os.pathsep.join(map(str, (*folders, SOURCE)))


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll `condition` until it gives something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class Mpi:
    """Runs tests/cluster/programs/world.py as an MPI world; each rank writes rank-N.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, job: JobConfig, ranks: int, mode: str, launch: bool = True) -> dict[int, Any]:
        """Run the world to its end; return what each rank wrote."""
        job_file = self.folder / "job.yaml"
        job_file.write_text(dump_job(job))
        program = [sys.executable, str(HERE / "programs" / "world.py"), str(job_file), mode]
        program.append(str(self.folder))
        command = local_launch(ranks, program).command if launch else program
        environment = {**os.environ, "PYTHONPATH": python_path()}
        done = subprocess.run(
            command, env=environment, timeout=60, check=False, capture_output=True, text=True
        )
        print(done.stdout, done.stderr)
        return {
            int(path.stem.partition("-")[2]): json.loads(path.read_text())
            for path in self.folder.glob("rank-*.json")
        }


@pytest.fixture
def mpi(tmp_path: Path) -> Mpi:
    """An MPI world whose files lie in the test's folder."""
    return Mpi(tmp_path)
