# SPDX-License-Identifier: Apache-2.0
"""The vLLM process and its guardian, with small programs in vLLM's place."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rdma_kv_cache.cluster import guardian
from rdma_kv_cache.cluster.vllm_process import (
    VllmProcess,
    describe_exit,
    free_port,
    is_port_taken,
)
from tests.cluster.conftest import is_alive, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Writes the pids of itself and of two grandchildren, one in a session of its own, then sleeps.
SERVER = """
import pathlib, os, signal, subprocess, sys, time
{prelude}
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
part = pathlib.Path(sys.argv[1] + ".part")
part.write_text(" ".join(map(str, [os.getpid(), *(c.pid for c in children)])))
part.rename(sys.argv[1])
time.sleep(600)
"""


def server(folder: Path, prelude: str = "") -> list[str]:
    return [sys.executable, "-c", SERVER.format(prelude=prelude), str(folder / "pids")]


def read_pids(folder: Path) -> list[int]:
    path = folder / "pids"
    wait_until(path.exists, 10, "the server's pids")
    return [int(pid) for pid in path.read_text().split()]


def run(folder: Path, prelude: str, act: Callable[[VllmProcess], Awaitable[str]]) -> str:
    """Start the server, do `act`, and check that nothing is left; return what `act` returned."""

    async def main() -> tuple[str, list[int]]:
        process = await VllmProcess.start(server(folder, prelude), os.environ, folder / "log")
        pids = await asyncio.to_thread(read_pids, folder)
        assert process.pid == pids[0]
        assert all(map(is_alive, pids))
        how = await act(process)
        assert not process.is_running
        return how, pids

    how, pids = asyncio.run(main())
    assert not [pid for pid in pids if is_alive(pid)]
    return how


def test_sigterm_ends_a_server_and_its_orphans(tmp_path: Path) -> None:
    how = run(tmp_path, "", lambda process: process.terminate_and_reap(5))
    assert how == "ended by SIGTERM after SIGTERM"


def test_an_orderly_exit_is_told_apart(tmp_path: Path) -> None:
    prelude = "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))"
    how = run(tmp_path, prelude, lambda process: process.terminate_and_reap(5))
    assert how == "exited with code 7 after SIGTERM"


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    prelude = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    started = time.monotonic()
    how = run(tmp_path, prelude, lambda process: process.terminate_and_reap(0.3))
    assert how == "killed, it ignored SIGTERM for 0.3 s"
    assert time.monotonic() - started < 5


def test_a_stopped_server_is_killed(tmp_path: Path) -> None:
    async def act(process: VllmProcess) -> str:
        os.kill(process.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 5, "the stop")
        return await process.terminate_and_reap(0.3)

    assert run(tmp_path, "", act).startswith("killed")


def test_orphans_of_a_killed_server_end_too(tmp_path: Path) -> None:
    async def act(process: VllmProcess) -> str:
        os.kill(process.pid, signal.SIGKILL)
        how = await asyncio.wait_for(process.wait(), 10)
        assert process.outcome == how
        assert await process.terminate_and_reap(5) == how  # is harmless afterwards
        return how

    assert run(tmp_path, "", act) == "ended by SIGKILL"


def test_a_group_signal_reaches_the_server_once(tmp_path: Path) -> None:
    """Like mpiexec, which signals whole groups; and SIGUSR1, which it sends when a rank dies."""
    prelude = f"signal.signal(signal.SIGTERM, lambda *_: open('{tmp_path}/terms', 'a').write('x'))"
    program = guardian.guarded(server(tmp_path, prelude), os.getpid())
    process = subprocess.Popen(program, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        pids = read_pids(tmp_path)
        os.killpg(process.pid, signal.SIGUSR1)
        os.killpg(process.pid, signal.SIGTERM)
        wait_until((tmp_path / "terms").exists, 5, "SIGTERM")
        time.sleep(0.3)
        assert (tmp_path / "terms").read_text() == "x"
        assert process.poll() is None
    finally:
        process.send_signal(guardian.KILL_ALL)
        assert process.wait(10) == 128 + signal.SIGKILL
    assert not [pid for pid in pids if is_alive(pid)]


def test_everything_ends_with_a_killed_owner(tmp_path: Path) -> None:
    owner = f"""
import asyncio, os
from pathlib import Path
from rdma_kv_cache.cluster.vllm_process import VllmProcess
async def main():
    await VllmProcess.start({server(tmp_path)!r}, os.environ, Path({str(tmp_path / "log")!r}))
    await asyncio.sleep(600)
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", owner], env=environment)
    try:
        pids = read_pids(tmp_path)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(map(is_alive, pids)), 10, "the end of what the owner started")


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    async def main() -> str:
        process = await VllmProcess.start(["/no/such"], os.environ, tmp_path / "log")
        assert process.pid == 0
        return await process.wait()

    assert asyncio.run(main()) == "exited with code 127"
    assert "cannot start /no/such" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (137, "ended by SIGKILL"),
        (-11, "ended by SIGSEGV"),
        (250, "exited with code 250"),
    ],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words


def test_ports() -> None:
    port = free_port("127.0.0.1")
    assert not is_port_taken("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert is_port_taken("127.0.0.1", port)
