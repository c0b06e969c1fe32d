# SPDX-License-Identifier: Apache-2.0
"""The files of a run, and the ranks' places."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

from rdma_kv_cache.cluster.roles import Place, new_incarnation, place_of
from rdma_kv_cache.cluster.run_dir import EngineStatus, RunDir, RunState
from tests.cluster.conftest import make_job

if TYPE_CHECKING:
    from pathlib import Path


def test_state_is_read_back_whole(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    assert run_dir.read_state() is None
    engine = EngineStatus("prefill-0", "prefill", "http://h:1", "READY", 2**63 - 1, 1, 77)
    state = RunState("READY", "serving", "", "http://h:2", "key", 5, "host", [engine])
    run_dir.write_state(state)
    assert run_dir.read_state() == state
    assert [path.name for path in run_dir.path.iterdir() if path.is_file()] == ["state.json"]


def test_a_reader_never_sees_half_a_state(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    states = [RunState("STARTING", stage=letter * 100_000) for letter in "ab"]
    run_dir.write_state(states[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for state in states:
                run_dir.write_state(state)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert run_dir.read_state() in states
    finally:
        stop.set()
        writer.join()


def test_files_are_private(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    path = run_dir.write_api_key("secret")
    assert path.stat().st_mode & 0o777 == 0o600
    assert run_dir.path.stat().st_mode & 0o777 == 0o700
    assert run_dir.read_api_key() == "secret"


def test_a_new_run_forgets_the_state_of_the_last(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    run_dir.write_state(RunState("READY"))
    run_dir.write_api_key("old")
    run_dir.create()
    assert run_dir.read_state() is None
    assert run_dir.read_api_key() is None


@pytest.mark.parametrize("text", ["", "{", '{"state": "SLEEPING"}', "[]"])
def test_a_file_that_is_no_state_is_an_error(tmp_path: Path, text: str) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.state_file.write_text(text)
    with pytest.raises(msgspec.MsgspecError):
        run_dir.read_state()


def test_places_go_orchestrator_prefill_decode() -> None:
    job = make_job(prefill={"engines": 2}, decode={"engines": 3})
    assert [place_of(rank, job).engine for rank in range(job.world_size)] == [
        "orchestrator",
        "prefill-0",
        "prefill-1",
        "decode-0",
        "decode-1",
        "decode-2",
    ]
    assert place_of(2, job) == Place("prefill", "prefill-1")
    assert place_of(3, job).role == "decode"
    for rank in (-1, 6):
        with pytest.raises(ValueError, match=f"rank {rank} of a job of 6"):
            place_of(rank, job)


def test_incarnations_are_positive_and_differ() -> None:
    found = {new_incarnation() for _ in range(100)}
    assert len(found) == 100
    assert all(0 < number < 2**63 for number in found)
