# SPDX-License-Identifier: Apache-2.0
"""A look at several jobs: one query of Slurm, the services asked, the end of a job noted."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import aiohttp
import msgspec

from rdma_kv_cache.cluster.run_dir import RunDir, RunState
from rdma_kv_cache.slurm import records
from rdma_kv_cache.watch.probe import Target, ask, parse_load, tokens_per_s
from rdma_kv_cache.watch.watcher import Watcher
from tests.watch.conftest import KEY, FakeSlurm, Service, ready, start, submit

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from rdma_kv_cache.watch.probe import Answer
    from rdma_kv_cache.watch.views import JobView

METRICS = """\
# TYPE rdma_kv_requests_inflight gauge
rdma_kv_requests_inflight 5.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine_name="prefill-0",role="prefill"} 1.0
vllm:num_requests_running{engine_name="decode-0",role="decode"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine_name="decode-0",role="decode"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine_name="decode-0",role="decode"} 0.25
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine_name="prefill-0",role="prefill"} 100.0
vllm:generation_tokens_total{engine_name="decode-0",role="decode"} 900.0
"""
RUNNING = "7+0|RUNNING|None|p0|1|1:00|9:00|2026-11-24T18:00:00|main|serve"
FOLLOWER = "7+1|{}|None|d0|1|1:00|9:00|2026-11-24T18:00:00|main|serve"


def look(runs: Path, watcher: Watcher | None = None) -> dict[str, JobView]:
    watcher = watcher or Watcher(runs, login_host="login")
    return {view.job: view for view in watcher.look(watcher.folders())}


def ask_once(target: Target) -> Answer:
    async def main() -> Answer:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0)) as session:
            return await ask(session, target)

    return asyncio.run(main())


def test_a_ready_job_whole(runs: Path, slurm: FakeSlurm, service: Service) -> None:
    slurm.set("squeue", RUNNING, FOLLOWER.format("RUNNING"))
    service.serve(METRICS)
    run = start(submit(runs, 7, predecessor=6))
    key_file = run.write_api_key(KEY)
    host = socket.gethostname()
    run.write_state(ready(service.url, host, api_key_file=str(key_file)))
    view = look(runs)["7"]
    assert (view.state, view.detail, view.verified) == ("READY", "", True)
    assert view.url == service.url
    assert view.tunnel.startswith("ssh -N -J ")
    assert view.api_key_file == str(key_file)
    assert view.follows == 6
    assert [(part.state, part.nodes) for part in view.components] == [
        ("RUNNING", "p0"),
        ("RUNNING", "d0"),
    ]
    assert view.requests == {"inflight": 5, "running": 4, "waiting": 2}
    prefill, decode = view.engines
    assert (prefill.host, prefill.running, prefill.waiting) == ("p0", 1, 0)
    assert (decode.running, decode.waiting, decode.kv_cache_used) == (3, 2, 0.25)
    assert view.notes == []


def test_tokens_per_second_need_two_pages(runs: Path, slurm: FakeSlurm, service: Service) -> None:
    slurm.set("squeue", RUNNING)
    service.serve(METRICS)
    run = start(submit(runs, 7), ready(service.url, socket.gethostname()))
    run.write_api_key(KEY)
    watcher = Watcher(runs)
    (view,) = watcher.look(watcher.folders())
    assert view.tokens_per_s is None
    service.serve(METRICS.replace("900.0", "950.0"))
    (view,) = watcher.look(watcher.folders())
    assert view.tokens_per_s is not None
    assert view.tokens_per_s > 0
    (view,) = watcher.look(watcher.folders(), sample_s=0.01)
    assert view.tokens_per_s == 0
    before, now = parse_load(METRICS, 1.0), parse_load(METRICS.replace("900.0", "1000.0"), 3.0)
    assert tokens_per_s(before, now) == 50
    assert tokens_per_s(now, before) is None
    # The engine was restarted.
    assert tokens_per_s(parse_load(METRICS, 1.0), parse_load(METRICS.replace("900", "9"), 2.0)) == 0


def test_what_a_service_may_answer(service: Service, closed_url: str) -> None:
    service.serve(METRICS)
    assert ask_once(Target(service.url, KEY)).engines
    keyless = ask_once(Target(service.url))
    assert keyless.ready
    assert keyless.state is None
    assert keyless.load is None
    service.pages["/ready"] = (503, '{"ready": false, "reason": "the run is STARTING"}')
    assert ask_once(Target(service.url, KEY)).reason == "the run is STARTING"
    service.pages["/ready"] = (200, "<html>")
    assert service.url in ask_once(Target(service.url, KEY)).error
    refused = ask_once(Target(closed_url))
    assert refused.refused
    assert "refused" in refused.error.lower()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = ask_once(Target(f"http://127.0.0.1:{mute.getsockname()[1]}"))
    assert "does not answer" in silent.error
    assert not silent.refused


def test_slurm_is_asked_once_for_all_and_not_again_at_once(runs: Path, slurm: FakeSlurm) -> None:
    slurm.set("squeue", *(f"{n}|PENDING|Priority||1|0:00|5:00|N/A|main|serve" for n in (1, 2, 3)))
    for job_id in (1, 2, 3):
        submit(runs, job_id)
    watcher = Watcher(runs)
    for _ in range(3):
        views = look(runs, watcher)
    assert {view.detail for view in views.values()} == {"Priority"}
    assert len(slurm.calls("squeue")) == 1
    assert slurm.calls("sacct") == []
    watcher.expire()
    look(runs, watcher)
    assert len(slurm.calls("squeue")) == 2


def test_a_job_submitted_after_the_query_is_not_taken_for_forgotten(
    runs: Path, slurm: FakeSlurm
) -> None:
    watcher = Watcher(runs)
    watcher.ask_slurm()
    folder = submit(runs, 7)
    record = records.read(folder)
    assert record is not None
    records.write(msgspec.structs.replace(record, submitted=time.time()))
    slurm.set("squeue", "7|PENDING|Priority||1|0:00|5:00|N/A|main|serve")
    for _ in range(2):
        assert look(runs, watcher)["7"].state == "PENDING"
    assert len(slurm.calls("squeue")) == 2


def test_a_job_that_started_after_the_query_has_its_nodes(
    runs: Path, slurm: FakeSlurm, service: Service
) -> None:
    folder = submit(runs, 7)
    slurm.set("squeue", "7+0|PENDING|Priority||1|0:00|9:00|N/A|main|serve")
    watcher = Watcher(runs)
    assert look(runs, watcher)["7"].state == "PENDING"
    slurm.set("squeue", RUNNING)
    service.serve()
    start(folder, ready(service.url))
    views = [look(runs, watcher)["7"] for _ in range(3)]
    assert [[part.nodes for part in view.components] for view in views] == [["p0"]] * 3
    assert len(slurm.calls("squeue")) == 2


def test_how_a_job_ended_is_kept(runs: Path, slurm: FakeSlurm) -> None:
    slurm.set("squeue", "7|NODE_FAIL|None|p0|1|1:00|9:00|2026-11-24T18:00:00|main|serve")
    start(submit(runs, 7), ready("http://127.0.0.1:1"))
    assert "a node was lost" in look(runs)["7"].detail
    slurm.set("squeue")
    assert "a node was lost" in look(runs)["7"].detail
    assert slurm.calls("sacct") == []


def test_accounting_is_asked_for_what_squeue_has_forgotten(runs: Path, slurm: FakeSlurm) -> None:
    slurm.set("sacct", "7|TIMEOUT|0:0|p0|1|00:10:00|00:10:00|2026-11-24T18:00:00|main|serve")
    start(submit(runs, 7), ready("http://127.0.0.1:1"))
    start(submit(runs, 8), RunState("FAILED", "serving", "no decode engine is left"))
    views = look(runs)
    assert views["7"].detail == "TIMEOUT: it reached its time limit"
    assert views["8"].detail == "no decode engine is left"
    assert len(slurm.calls("sacct")) == 1
    assert "--jobs=7" in slurm.calls("sacct")[0]
    assert look(runs)["7"].state == "FAILED"
    assert len(slurm.calls("sacct")) == 1


def test_without_accounting_it_is_asked_once(runs: Path, slurm: FakeSlurm) -> None:
    start(submit(runs, 7), RunState("STARTING", "the engines connect"))
    watcher = Watcher(runs, query_interval_s=0.0)
    for _ in range(2):
        view = look(runs, watcher)["7"]
        assert (view.state, len(slurm.calls("sacct"))) == ("FAILED", 1)
    assert "ended while STARTING (the engines connect)" in view.detail


def test_without_slurm_the_runs_still_speak(
    runs: Path, tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    service.serve()
    start(submit(runs, 7), ready(service.url, socket.gethostname()))
    submit(runs, 8)
    start(submit(runs, 9), RunState("DONE", "stopped"))
    views = look(runs)
    assert [view.state for view in views.values()] == ["READY", "PENDING", "DONE"]
    missing = f"no squeue on PATH ({tmp_path})"
    assert views["8"].detail == f"not known: {missing}"
    assert f"Slurm could not be asked: {missing}" in views["7"].notes


def test_a_job_by_our_sbatch_scripts_is_listed_while_it_waits(runs: Path, slurm: FakeSlurm) -> None:
    waiting = "{}|PENDING|Priority||1|0:00|5:00|N/A|main|{}"
    slurm.set("squeue", waiting.format(7, "rdma-kv-serve"), waiting.format(8, "another"))
    assert [(job, view.state) for job, view in look(runs).items()] == [("7", "PENDING")]
    start(submit(runs, 7, name="rdma-kv-serve"), RunState("STARTING"))
    assert list(look(runs)) == ["7"]


def test_local_runs_need_no_slurm(runs: Path, slurm: FakeSlurm, service: Service) -> None:
    service.serve()
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    for name, pid in (("demo-1-a", os.getpid()), ("demo-2-b", ended.pid)):
        run = RunDir(runs / name)
        run.create()
        run.write_state(ready(service.url, host, pid=pid))
    views = look(runs)
    assert views["demo-1-a"].state == "READY"
    assert "has died" in views["demo-2-b"].detail
    slurm.calls_file.unlink()
    watcher = Watcher(runs)
    watcher.look([watcher.find("demo-1-a")])
    assert slurm.calls("squeue") == []


def test_what_else_the_user_should_know(
    runs: Path, slurm: FakeSlurm, service: Service, closed_url: str
) -> None:
    slurm.set(
        "squeue",
        RUNNING,
        FOLLOWER.format("CANCELLED"),
        RUNNING.replace("7+0", "8"),
        RUNNING.replace("7+0", "9"),
    )
    service.serve()
    nodes = json.loads(service.pages["/nodes"][1])
    nodes["engines"][1].update(state="LOST", reason="no heartbeat for 10 s")
    service.pages["/nodes"] = (200, json.dumps(nodes))
    run = start(submit(runs, 7), ready(service.url, socket.gethostname()))
    run.write_api_key(KEY)
    start(submit(runs, 8), ready("http://127.0.0.1:1", host="elsewhere"))
    start(submit(runs, 9), ready(closed_url, host=socket.gethostname()))
    views = look(runs)
    assert views["7"].notes == [
        "component 1 (d0) is CANCELLED: its engines are lost",
        "decode-0 is LOST: no heartbeat for 10 s",
    ]
    assert (views["8"].state, views["8"].verified) == ("READY", False)
    assert "not checked from here: it listens on elsewhere only" in views["8"].notes[0]
    assert [engine.host for engine in views["8"].engines] == ["p0", "d0"]
    assert views["9"].state == "DRAINING"
    assert "nothing listens any more" in views["9"].detail


def test_slow_paths_are_told(runs: Path, slurm: FakeSlurm, service: Service) -> None:
    slurm.set("squeue", RUNNING)
    service.serve()
    nodes = json.loads(service.pages["/nodes"][1])
    for engine, peer in zip(nodes["engines"], ("decode-0", "prefill-0"), strict=True):
        engine["paths"] = [{"peer": peer, "backend": "tcp", "warning": "no NIC"}]
    service.pages["/nodes"] = (200, json.dumps(nodes))
    run = start(submit(runs, 7), ready(service.url, socket.gethostname()))
    run.write_api_key(KEY)
    assert look(runs)["7"].notes == ["slow path prefill-0 to decode-0: no NIC"]


def test_a_job_in_the_queue_without_a_folder_is_found_by_its_id(
    runs: Path, slurm: FakeSlurm
) -> None:
    slurm.set("squeue", "77|PENDING|Priority||1|0:00|5:00|N/A|main|mine")
    watcher = Watcher(runs)
    (view,) = watcher.look([watcher.find("77")])
    assert (view.job, view.name, view.state) == ("77", "mine", "PENDING")
