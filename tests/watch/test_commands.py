# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv list`, `status`, `logs` and `stop`: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from rdma_kv_cache.cli import main
from rdma_kv_cache.cluster.run_dir import RunDir, RunState
from tests.watch.conftest import FakeSlurm, Service, ready, start, submit

if TYPE_CHECKING:
    from click.testing import Result

ROOT = Path(__file__).parents[2]
RUNNING = "{}|RUNNING|None|p0|1|1:00|9:00|2026-11-24T18:00:00|main|serve"
PENDING = "{}|PENDING|Priority||1|0:00|9:00|N/A|main|serve"


@pytest.fixture(autouse=True)
def _no_site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RDMA_KV_SITE", raising=False)


def rdma_kv(runs: Path, command: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, [command, *arguments, "--runs", str(runs)])


@pytest.mark.parametrize("command", ["list", "status", "logs", "stop"])
def test_each_help_has_an_example_and_the_exit_codes(command: str) -> None:
    text = CliRunner().invoke(main, [command, "--help"]).output
    assert f"rdma-kv {command}" in text.partition("Example:")[2]
    assert "Exit code: 0" in text


def test_list(runs: Path, slurm: FakeSlurm, service: Service) -> None:
    slurm.set("squeue", RUNNING.format(7), PENDING.format(8))
    service.serve()
    start(submit(runs, 7), ready(service.url, socket.gethostname()))
    submit(runs, 8)
    start(submit(runs, 6), RunState("FAILED", "serving", "no decode engine is left"))
    old = submit(runs, 5)
    run = start(old, RunState("DONE", "stopped"))
    for path in (run.state_file, old):
        os.utime(path, (0, 0))
    lines = rdma_kv(runs, "list").stdout.splitlines()
    rows = {words[0]: line for line in lines if (words := line.split()) and words[0].isdigit()}
    assert list(rows) == ["6", "7", "8"]
    assert "READY" in rows["7"]
    assert service.url in rows["7"]
    assert "Priority" in rows["8"]
    assert "no decode engine is left" in rows["6"]
    everything = json.loads(rdma_kv(runs, "list", "--all", "--json").stdout)
    assert [view["job_id"] for view in everything] == [5, 6, 7, 8]
    assert [view["state"] for view in everything] == ["DONE", "FAILED", "READY", "PENDING"]


def test_list_of_nothing(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = rdma_kv(runs, "list")
    assert result.exit_code == 0
    assert f"No jobs in {runs}" in result.stderr
    assert f"Slurm could not be asked: no squeue on PATH ({tmp_path})" in result.stderr
    assert json.loads(rdma_kv(runs, "list", "--json").stdout) == []


def test_status(runs: Path, slurm: FakeSlurm, service: Service) -> None:
    slurm.set("squeue", RUNNING.format(7))
    service.serve()
    run = start(submit(runs, 7))
    key_file = run.write_api_key("rkv-test")
    run.write_state(ready(service.url, socket.gethostname(), api_key_file=str(key_file)))
    text = rdma_kv(runs, "status", "7").stdout
    assert "State        READY" in text
    assert f"URL          {service.url}" in text
    assert f"Key file     {key_file}" in text
    assert "Tunnel       ssh -N " in text
    assert "decode-0" in text
    # The only job that has not ended need not be named.
    view = json.loads(rdma_kv(runs, "status", "--json").stdout)
    assert view["state"] == "READY"
    assert view["engines"][1]["host"] == "d0"


def test_status_watch_ends_with_the_job(runs: Path, slurm: FakeSlurm) -> None:
    start(submit(runs, 7), RunState("DONE", "stopped"))
    (line,) = rdma_kv(runs, "status", "7", "--watch", "--json").stdout.splitlines()
    assert json.loads(line)["state"] == "DONE"
    assert rdma_kv(runs, "status", "7", "--watch").stdout.split()[1:] == ["DONE"]
    assert len(slurm.calls("squeue")) == 2


def test_status_waits_for_ready(
    runs: Path, slurm: FakeSlurm, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdma_kv_cache.cli.status.REFRESH_S", 0.05)
    slurm.set("squeue", RUNNING.format(7))
    folder = submit(runs, 7)
    run = start(folder, RunState("STARTING", "the engines connect"))
    short = rdma_kv(runs, "status", "7", "--wait", "0.1")
    assert short.exit_code == 1
    assert "7: STARTING the engines connect" in short.stderr
    service.serve()
    later = threading.Timer(0.2, run.write_state, (ready(service.url, socket.gethostname()),))
    later.start()
    result = rdma_kv(runs, "status", "7", "--wait", "20")
    later.join()
    assert result.exit_code == 0
    assert "READY" in result.stdout
    run.write_state(RunState("FAILED", "serving", "no decode engine is left"))
    assert rdma_kv(runs, "status", "7", "--wait", "20").exit_code == 1


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_an_unknown_job(runs: Path, slurm: FakeSlurm, command: str) -> None:
    submit(runs, 7)
    slurm.set("squeue", PENDING.format(7))
    result = rdma_kv(runs, command, "4711")
    assert result.exit_code == 2
    assert f"no job '4711'; the latest are 7 (serve) in {runs}" in result.output


def write_logs(run: RunDir) -> None:
    run.launcher_log.write_text(
        "0: orchestrator at http://p0:1\n3: decode starts\n[0] serving\n 0: ends\nsrun: done\n"
    )
    run.engine_log("prefill-0").write_text("vLLM one\n")
    run.engine_log("decode-0").write_text("".join(f"line {n}\n" for n in range(50)))


def test_logs(runs: Path, slurm: FakeSlurm) -> None:
    folder = submit(runs, 7)
    run = start(folder, RunState("DONE", "stopped"))
    empty = rdma_kv(runs, "logs", "7")
    assert empty.exit_code == 1
    assert "has no such log yet" in empty.output
    write_logs(run)
    (runs / "serve-7.out").write_text("the batch script\n")
    output = rdma_kv(runs, "logs", "7", "-n", "2").stdout
    assert output.count("==>") == 4
    assert "line 49" in output
    assert "line 47" not in output
    rank_0 = rdma_kv(runs, "logs", "7", "0").stdout
    assert rank_0.splitlines() == ["orchestrator at http://p0:1", "serving", "ends"]
    assert rdma_kv(runs, "logs", "7", "orchestrator").stdout == rank_0
    # Ranks 1 and 2 are the two prefill engines, rank 3 is decode-0.
    by_rank = rdma_kv(runs, "logs", "7", "3", "-n", "1").stdout
    assert "decode starts" in by_rank
    assert "line 49" in by_rank
    assert rdma_kv(runs, "logs", "7", "decode-0", "-n", "1").stdout == by_rank
    assert rdma_kv(runs, "logs", "7", "slurm").stdout == "the batch script\n"
    assert "srun: done" in rdma_kv(runs, "logs", "7", "launcher").stdout
    lines = rdma_kv(runs, "logs", "7", "decode-0", "--json", "-n", "1").stdout.splitlines()
    assert json.loads(lines[1])["line"] == "line 49"
    unknown = rdma_kv(runs, "logs", "7", "9")
    assert unknown.exit_code == 2
    assert "has no rank '9'; it has orchestrator, prefill-0, prefill-1, decode-0" in unknown.output
    assert "it has 0." in rdma_kv(runs, "logs", "7", "--attempt", "3").output


def test_logs_follow_until_the_run_has_ended(
    runs: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdma_kv_cache.cli.logs.QUIET_S", 0.3)
    monkeypatch.setattr("rdma_kv_cache.cli.logs.POLL_S", 0.02)
    run = start(submit(runs, 7), RunState("READY"))
    write_logs(run)

    def go_on() -> None:
        with run.engine_log("prefill-0").open("a") as file:
            for text in ("half", " and half\n", "last\n"):
                file.write(text)
                file.flush()
                time.sleep(0.1)
        run.write_state(RunState("DONE"))

    writer = threading.Timer(0.1, go_on)
    writer.start()
    output = rdma_kv(runs, "logs", "7", "prefill-0", "--follow").stdout
    writer.join()
    assert [line for line in output.splitlines() if "==>" not in line] == [
        "vLLM one",
        "half and half",
        "last",
    ]


def test_stop_drains_a_job(runs: Path, slurm: FakeSlurm) -> None:
    run = start(submit(runs, 7), ready("http://127.0.0.1:1", host="elsewhere"))
    slurm.set("squeue", RUNNING.format(7))
    # What the batch script does at SIGTERM, and what Slurm says after it.
    ended = RUNNING.format(7).replace("RUNNING", "COMPLETED")
    done = json.dumps({"state": "DONE"})
    slurm.set(
        "scancel",
        then=f"echo '{done}' > {run.state_file}; echo '{ended}' > {slurm.folder}/squeue.out",
    )
    result = rdma_kv(runs, "stop", "7")
    assert result.exit_code == 0, result.output
    assert "7: stopped in order" in result.stdout
    assert slurm.calls("scancel") == ["--batch --signal=TERM 7"]
    assert "7: was DONE already" in rdma_kv(runs, "stop", "7").stdout


def test_stop_cancels_what_does_not_stop(runs: Path, slurm: FakeSlurm) -> None:
    start(submit(runs, 7), ready("http://127.0.0.1:1", host="elsewhere"))
    submit(runs, 8)
    slurm.set("squeue", RUNNING.format(7), PENDING.format(8))
    cancelled = "echo '{}' > {}/squeue.out".format(
        RUNNING.format(7).replace("RUNNING", "CANCELLED"), slurm.folder
    )
    slurm.set("scancel", then=f'[ "$*" != 7 ] || {cancelled}')
    result = rdma_kv(runs, "stop", "7", "--grace", "0.1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [{"job": "7", "is_over": True, "how": "cancelled"}]
    assert slurm.calls("scancel") == ["--batch --signal=TERM 7", "7"]
    slurm.calls_file.unlink()
    slurm.set("squeue", RUNNING.format(7))
    assert rdma_kv(runs, "stop", "7", "--now").exit_code == 0
    assert slurm.calls("scancel") == ["7"]


def test_stop_sees_a_job_that_ends_without_a_word(runs: Path, slurm: FakeSlurm) -> None:
    start(submit(runs, 7), ready("http://127.0.0.1:1", host="elsewhere"))
    slurm.set("squeue", RUNNING.format(7))
    ended = RUNNING.format(7).replace("RUNNING", "COMPLETED")
    slurm.set("scancel", then=f"echo '{ended}' > {slurm.folder}/squeue.out")
    assert "7: ended" in rdma_kv(runs, "stop", "7").stdout


def test_stop_does_not_disturb_a_job_that_drains(runs: Path, slurm: FakeSlurm) -> None:
    run = start(submit(runs, 7), RunState("DRAINING", "1 requests are in flight"))
    slurm.set("squeue", RUNNING.format(7))

    def end() -> None:
        slurm.set("squeue", RUNNING.format(7).replace("RUNNING", "COMPLETED"))
        run.write_state(RunState("DONE", "stopped"))

    later = threading.Timer(0.5, end)
    later.start()
    result = rdma_kv(runs, "stop", "7")
    later.join()
    assert "7: stopped in order" in result.stdout
    assert slurm.calls("scancel") == []


def test_stop_ends_successors_first(runs: Path, slurm: FakeSlurm) -> None:
    for job_id, before in ((7, None), (8, 7), (9, 8), (10, None)):
        submit(runs, job_id, predecessor=before)
    slurm.set("squeue", *(PENDING.format(n) for n in (7, 8, 9, 10)))
    gone = f'sed -i "/^$1|/d" {slurm.folder}/squeue.out'
    slurm.set("scancel", then=gone)
    result = rdma_kv(runs, "stop", "7")
    assert result.exit_code == 0, result.output
    assert slurm.calls("scancel") == ["9", "8", "7"]
    assert "7: cancelled before it started" in result.stdout
    assert "say which JOB" not in rdma_kv(runs, "stop").output  # only 10 is left
    assert slurm.calls("scancel")[-1] == "10"


def test_stop_says_what_it_cannot_do(
    runs: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(runs, 7)
    slurm.set("squeue", PENDING.format(7))
    slurm.set("scancel", error="scancel: error: Access denied")
    result = rdma_kv(runs, "stop", "7")
    assert result.exit_code == 1
    assert "job 7 was not stopped: scancel: error: Access denied" in result.output
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no squeue on PATH" in rdma_kv(runs, "stop", "7").output


def test_stop_of_a_local_run(runs: Path) -> None:
    run = RunDir(runs / "demo")
    run.create()
    program = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "def end(*_):\n"
        f'    Path({str(run.state_file)!r}).write_text(\'{{"state": "DONE"}}\')\n'
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print(flush=True)\n"
        "time.sleep(60)  # rdma_kv_cache\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        run.write_state(RunState("READY", pid=process.pid, host=socket.gethostname()))
        result = rdma_kv(runs, "stop", "demo")
        assert result.exit_code == 0, result.output
        assert "demo: stopped in order" in result.stdout
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
    run.write_state(RunState("READY", pid=1, host="elsewhere"))
    assert "it runs on elsewhere: stop it there" in rdma_kv(runs, "stop", "demo").output


def test_smart_stop_hands_over(runs: Path, slurm: FakeSlurm) -> None:
    submit(runs, 7)
    slurm.set("squeue", PENDING.format(7))
    slurm.set("scancel", then=f": > {slurm.folder}/squeue.out")
    program = slurm.folder / "rdma-kv"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m rdma_kv_cache.cli "$@"\n')
    program.chmod(0o755)
    script = [str(ROOT / "sbatch" / "smart_stop.sh")]
    environment = {**os.environ, "RDMA_KV": str(program)}
    done = subprocess.run(
        [*script, "7", "--runs", str(runs)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "7: cancelled before it started" in done.stdout


def test_smart_stop_without_an_environment(tmp_path: Path, slurm: FakeSlurm) -> None:
    script = tmp_path / "sbatch" / "smart_stop.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "sbatch" / "smart_stop.sh", script)

    def smart_stop(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, *arguments], capture_output=True, text=True, check=False, env=plain
        )

    plain = {"PATH": os.environ["PATH"]}
    done = smart_stop("77+1")
    assert done.returncode == 0
    assert slurm.calls("scancel") == ["--batch --signal=TERM 77"]
    assert "if it stays: scancel 77" in done.stderr
    done = smart_stop()
    assert done.returncode == 2
    assert "no rdma-kv in" in done.stderr
    assert "smart_stop.sh [JOB]" in smart_stop("--help").stdout
