# SPDX-License-Identifier: Apache-2.0
"""How far a batch is: over attempts and over the jobs of a chain."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from rdma_kv_cache.batch.state import BatchState, write_state
from rdma_kv_cache.cli import main
from rdma_kv_cache.cluster.run_dir import RunState
from tests.watch.conftest import FakeSlurm, Service, ready, start, submit

if TYPE_CHECKING:
    from pathlib import Path

    from rdma_kv_cache.cluster.run_dir import RunDir

RUNNING = "{}|RUNNING|None|p0|1|1:00|9:00|2026-11-24T18:00:00|main|work"
PENDING = "{}|PENDING|Dependency||1|0:00|9:00|N/A|main|work"


@pytest.fixture(autouse=True)
def _no_site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RDMA_KV_SITE", raising=False)


def note(run: RunDir, answered: int, failed: int = 0, before: int = 0, seconds: float = 60) -> None:
    """Leave what the batch of a run leaves."""
    write_state(run.batch_file, BatchState(3000, answered, failed, before, seconds))


def shown(runs: Path, job: int) -> dict[str, object] | None:
    """The batch of `status --json`."""
    said = CliRunner().invoke(main, ["status", str(job), "--json", "--runs", str(runs)]).stdout
    batch: dict[str, object] | None = json.loads(said)["batch"]
    return batch


def test_status_and_list_of_a_batch(runs: Path, slurm: FakeSlurm, service: Service) -> None:
    slurm.set("squeue", RUNNING.format(7))
    service.serve()
    run = start(submit(runs, 7, kind="batch"), ready(service.url, socket.gethostname()))
    assert shown(runs, 7) is None
    note(run, 1198, 2, before=200, seconds=120)
    assert shown(runs, 7) == {
        "total": 3000,
        "answered": 1198,
        "failed": 2,
        "per_minute": 500,
        "remaining_s": 216,
    }
    text = "1,198 answered, 2 failed, of 3,000; 500 a minute, 0:03:36 left"
    assert text in CliRunner().invoke(main, ["status", "7", "--runs", str(runs)]).stdout
    assert text in CliRunner().invoke(main, ["list", "--runs", str(runs)]).stdout


def test_a_successor_goes_on_from_its_predecessors(runs: Path, slurm: FakeSlurm) -> None:
    slurm.set("squeue", RUNNING.format(8), PENDING.format(9))
    note(start(submit(runs, 7, kind="batch"), RunState("DONE")), 700)
    second = start(submit(runs, 8, kind="batch", predecessor=7), RunState("STARTING"))
    submit(runs, 9, kind="batch", predecessor=8)
    # The counts of before, and no rate: the engines of this job are others, or as many more.
    before = {"total": 3000, "answered": 700, "failed": 0, "per_minute": None, "remaining_s": None}
    assert shown(runs, 8) == shown(runs, 9) == before
    note(second, 1000, before=700)
    now = shown(runs, 8)
    assert now is not None
    assert (now["answered"], now["per_minute"]) == (1000, 300)


def test_a_requeued_job_goes_on_from_its_attempt_before(runs: Path, slurm: FakeSlurm) -> None:
    slurm.set("squeue", RUNNING.format(7))
    folder = submit(runs, 7, kind="batch")
    note(start(folder), 700)
    start(folder, RunState("STARTING"), attempt=1)
    now = shown(runs, 7)
    assert now is not None
    assert (now["answered"], now["per_minute"]) == (700, None)


def test_a_job_that_is_over_has_nothing_left_to_wait_for(runs: Path, slurm: FakeSlurm) -> None:
    note(start(submit(runs, 7, kind="batch"), RunState("FAILED", reason="no engine")), 700)
    now = shown(runs, 7)
    assert now is not None
    assert (now["answered"], now["per_minute"], now["remaining_s"]) == (700, 700, None)


def test_a_state_that_cannot_be_read_is_none(runs: Path, slurm: FakeSlurm) -> None:
    start(submit(runs, 7, kind="batch")).batch_file.write_text("{")
    assert shown(runs, 7) is None
