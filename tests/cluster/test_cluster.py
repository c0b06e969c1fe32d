# SPDX-License-Identifier: Apache-2.0
"""Whole clusters: mpiexec, orchestrator, engine ranks, and a stand-in where vLLM stands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rdma_kv_cache.cluster import guardian
from rdma_kv_cache.cluster.launch import Cluster
from rdma_kv_cache.cluster.launcher import ClusterError, find_mpiexec
from rdma_kv_cache.cluster.run_dir import EngineStatus, RunDir, RunState
from rdma_kv_cache.config import dump_job
from tests.cluster.conftest import STANDIN, is_alive, make_job, python_path, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdma_kv_cache.config import JobConfig

START_S = 40.0
RECOVER_S = 20.0


@pytest.fixture(autouse=True)
def _standin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path(STANDIN))


def make_cluster(folder: Path, job: JobConfig) -> Cluster:
    run_dir = RunDir(folder / "run")
    job_file = folder / "job.yaml"
    job_file.write_text(dump_job(job))
    return Cluster(job_file, job, run_dir)


@contextmanager
def running(folder: Path, job: JobConfig) -> Iterator[Cluster]:
    """A cluster that serves; nothing of it may be left afterwards."""
    with make_cluster(folder, job) as cluster:
        try:
            cluster.wait_ready(START_S)
            pids = guardian.descendants(os.getpid())
            yield cluster
        finally:
            print(cluster.run_dir.launcher_log.read_text())
        pids += guardian.descendants(os.getpid())
        cluster.stop(20)
    assert not [pid for pid in pids if is_alive(pid)]


def state_of(cluster: Cluster) -> RunState:
    state = cluster.run_dir.read_state()
    assert state is not None
    return state


def engine(cluster: Cluster, name: str) -> EngineStatus:
    return next(e for e in state_of(cluster).engines if e.name == name)


def wait_restarted(cluster: Cluster, before: EngineStatus) -> EngineStatus:
    """Wait until the engine is READY in another life."""

    def found() -> EngineStatus | None:
        now = engine(cluster, before.name)
        is_new = now.incarnation != before.incarnation
        return now if is_new and now.state == "READY" and now.pid else None

    now = wait_until(found, RECOVER_S, f"restart of {before.name}")
    assert isinstance(now, EngineStatus)
    return now


def core_of(cluster: Cluster, name: str) -> int:
    """The pid of the present life's engine core, from what the stand-in printed."""
    text = cluster.run_dir.engine_log(name).read_text()
    return int(re.findall(r"engine core (\d+)", text)[-1])


def rank_of(vllm_pid: int) -> int:
    """The pid of the rank: vLLM's parent is a guardian, and its parent is the rank."""
    pid = vllm_pid
    for _ in range(2):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


def complete(cluster: Cluster) -> dict[str, Any]:
    request = urllib.request.Request(
        cluster.url + "/v1/completions",
        json.dumps({"model": "m", "prompt": "x", "max_tokens": 2}).encode(),
        {"Authorization": f"Bearer {cluster.api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        body: dict[str, Any] = json.load(answer)
    return body


def test_a_cluster_serves_and_ends_in_order(tmp_path: Path) -> None:
    stages: list[str] = []
    with make_cluster(tmp_path, make_job()) as cluster:
        cluster.wait_ready(START_S, on_stage=stages.append)
        assert complete(cluster)["choices"][0]["text"] == "yes"
        assert [e.state for e in state_of(cluster).engines] == ["READY", "READY"]
        pids = guardian.descendants(os.getpid())
        assert core_of(cluster, "decode-0") in pids
        cluster.stop(20)
        assert state_of(cluster).state == "DONE"
    assert not [pid for pid in pids if is_alive(pid)]
    assert stages[-1] == "serving"
    assert len(stages) == len(set(stages))


def test_a_killed_vllm_is_restarted_in_a_new_incarnation(tmp_path: Path) -> None:
    with running(tmp_path, make_job()) as cluster:
        decode, prefill = engine(cluster, "decode-0"), engine(cluster, "prefill-0")
        core = core_of(cluster, "decode-0")
        os.kill(decode.pid, signal.SIGKILL)
        now = wait_restarted(cluster, decode)
        assert now.restarts == 1
        assert now.pid != decode.pid
        assert not is_alive(core)
        assert engine(cluster, "prefill-0").pid == prefill.pid
        assert complete(cluster)["choices"]
        # Twice in a row, and the other role too.
        os.kill(prefill.pid, signal.SIGKILL)
        wait_restarted(cluster, prefill)
        os.kill(now.pid, signal.SIGKILL)
        assert wait_restarted(cluster, now).restarts == 2


def test_a_hung_vllm_is_restarted(tmp_path: Path) -> None:
    with running(tmp_path, make_job()) as cluster:
        before = engine(cluster, "prefill-0")
        os.kill(before.pid, signal.SIGSTOP)
        assert wait_restarted(cluster, before).restarts == 1
        assert not is_alive(before.pid)


def test_a_killed_rank_takes_its_vllm_with_it_and_nothing_else(tmp_path: Path) -> None:
    with running(tmp_path, make_job()) as cluster:
        prefill, decode = engine(cluster, "prefill-0"), engine(cluster, "decode-0")
        core = core_of(cluster, "prefill-0")
        os.kill(rank_of(prefill.pid), signal.SIGKILL)
        wait_until(lambda: not is_alive(prefill.pid) and not is_alive(core), 5, "end of vLLM")
        wait_until(lambda: engine(cluster, "prefill-0").state == "LOST", RECOVER_S, "LOST")
        assert is_alive(decode.pid)
        assert is_alive(state_of(cluster).pid)
        assert state_of(cluster).state == "READY"
        assert complete(cluster)["choices"]


def test_restarts_are_limited(tmp_path: Path) -> None:
    marker = str(tmp_path / "marker")
    job = make_job(
        prefill={"env": {"STANDIN": "once", "STANDIN_MARKER": marker}},
        orchestrator={"max_restarts": 2},
    )
    with running(tmp_path, job) as cluster:
        os.kill(engine(cluster, "prefill-0").pid, signal.SIGKILL)
        wait_until(lambda: engine(cluster, "prefill-0").state == "LOST", RECOVER_S, "LOST")
        assert engine(cluster, "prefill-0").restarts == 2
        log = cluster.run_dir.launcher_log.read_text()
        assert "vLLM exited with code 4" in log
        assert "orchestrator.max_restarts = 2" in log
        assert complete(cluster)["choices"]


def test_an_engine_that_does_not_start_fails_the_run_with_its_reason(tmp_path: Path) -> None:
    job = make_job(decode={"engines": 2, "env": {"STANDIN": "exit"}})
    with make_cluster(tmp_path, job) as cluster:
        with pytest.raises(ClusterError) as error:
            cluster.wait_ready(START_S)
        print(cluster.run_dir.launcher_log.read_text())
    assert "vLLM exited with code 3" in str(error.value)
    assert re.search(r"logs/decode-[01]\.log", str(error.value))
    assert not guardian.descendants(os.getpid())


def test_engines_that_cannot_connect_fail_the_run_naming_the_pair(tmp_path: Path) -> None:
    job = make_job(decode={"env": {"STANDIN": "incompatible"}}, rdma={"connect_timeout_s": 0.2})
    with make_cluster(tmp_path, job) as cluster, pytest.raises(ClusterError) as error:
        cluster.wait_ready(START_S)
    assert "decode-0/0 cannot reach prefill-0/0: incompatible engines: dtype" in str(error.value)


def test_sigterm_to_all_ranks_ends_in_order(tmp_path: Path) -> None:
    """What scancel does: every rank gets SIGTERM at once."""
    with running(tmp_path, make_job()) as cluster:
        pids = [e.pid for e in state_of(cluster).engines]
        for pid in [state_of(cluster).pid, *map(rank_of, pids)]:
            os.kill(pid, signal.SIGTERM)
        cluster.wait()
        wait_until(lambda: not any(map(is_alive, pids)), 10, "end of vLLM")


def test_engines_end_when_the_orchestrator_is_killed(tmp_path: Path) -> None:
    job = make_job(orchestrator={"health_timeout_s": 0.4})
    with make_cluster(tmp_path, job) as cluster:
        cluster.wait_ready(START_S)
        pids = [e.pid for e in state_of(cluster).engines]
        os.kill(state_of(cluster).pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)), 15, "end of vLLM")
        with pytest.raises(ClusterError, match="before the run was over"):
            cluster.wait()


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(dump_job(make_job()))
    run_dir = RunDir(tmp_path / "run")
    program = f"""
import time
from pathlib import Path
from rdma_kv_cache.cluster.launch import Cluster
from rdma_kv_cache.cluster.run_dir import RunDir
from rdma_kv_cache.config import load_job
path = Path({str(job_file)!r})
with Cluster(path, load_job(path, env={{}}), RunDir({str(run_dir.path)!r})) as cluster:
    cluster.wait_ready({START_S})
    time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program])
    try:

        def is_ready() -> bool:
            state = run_dir.read_state()
            return state is not None and state.state == "READY"

        wait_until(is_ready, START_S, "READY")
        pids = guardian.descendants(launcher.pid)
    finally:
        launcher.kill()
        launcher.wait()
    assert len(pids) > 8
    wait_until(lambda: not any(map(is_alive, pids)), 15, "end of the ranks")


def test_without_mpiexec_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"pip install 'rdma-kv-cache\[mpich\]'"):
        find_mpiexec()
