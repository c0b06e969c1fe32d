# SPDX-License-Identifier: Apache-2.0
"""Which folders are jobs, which job is meant, and reading over a lagging file system."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from rdma_kv_cache.cluster.run_dir import RunDir, RunState
from rdma_kv_cache.watch import folders
from rdma_kv_cache.watch.folders import NoSuchJob, choose, find_folders, patiently, read_state
from tests.watch.conftest import ready, start, submit

if TYPE_CHECKING:
    from pathlib import Path


def test_jobs_and_local_runs_are_found(runs: Path) -> None:
    start(submit(runs, 12, name="llama"))
    submit(runs, 13, name="llama")
    start(runs / "by-hand-11", ready())
    local = RunDir(runs / "demo-20261124-101010-4242")
    local.create()
    (runs / "notes").mkdir()
    (runs / "llama-12.out").write_text("")
    found = find_folders(runs)
    assert [(folder.label, folder.name, folder.attempt) for folder in found] == [
        ("demo-20261124-101010-4242", "demo-20261124-101010-4242", None),
        ("11", "by-hand", 0),
        ("12", "llama", 0),
        ("13", "llama", None),
    ]
    assert [folder.kind for folder in found] == ["", "", "serve", "serve"]
    assert find_folders(runs / "none") == []


def test_the_latest_attempt_is_the_highest(runs: Path) -> None:
    folder = submit(runs, 5)
    for attempt in (2, 10, 0):
        start(folder, RunState("STARTING", str(attempt)), attempt)
    (found,) = find_folders(runs)
    assert found.attempt == 10
    assert list(found.attempts()) == [0, 2, 10]
    state = read_state(found.run).state
    assert state is not None
    assert state.stage == "10"


def test_a_job_is_meant_by_id_name_or_path(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for job_id in (9, 10):
        start(submit(runs, job_id))
    known = find_folders(runs)
    assert choose("9", known).job_id == 9
    assert choose("9+1", known).job_id == 9
    assert choose("serve", known).job_id == 10
    assert choose("serve-9", known).job_id == 9
    assert choose(str(runs / "serve-9"), []).job_id == 9
    assert choose(str(runs / "serve-9" / "attempt-0"), []).job_id == 9
    monkeypatch.chdir(runs / "serve-9")
    (runs / "serve-9" / "latest").symlink_to("attempt-0")
    assert choose("latest", []).job_id == 9
    with pytest.raises(NoSuchJob, match=r"no job '8'; the latest are 9 \(serve\), 10 \(serve\)"):
        choose("8", known)
    with pytest.raises(NoSuchJob, match="there is none"):
        choose("8", [])


def test_stale_handles_and_half_files_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_RETRIES_S", (0.0, 0.0))
    left = [errno.ESTALE, errno.ESTALE]

    def stale_twice() -> str:
        if left:
            raise OSError(left.pop(), "stale")
        return "read"

    assert patiently(stale_twice) == "read"
    left = [errno.ESTALE] * 3
    with pytest.raises(OSError, match="stale"):
        patiently(stale_twice)
    left = [errno.EACCES] * 2
    with pytest.raises(OSError, match="stale"):
        patiently(stale_twice)
    assert len(left) == 1

    run = RunDir(tmp_path)
    assert read_state(run) == folders.Reading(None)
    run.state_file.write_text('{"state": ')
    assert "is not a state" in read_state(run).problem


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.state_file.mkdir()
    assert os.strerror(errno.EISDIR) in read_state(run).problem
