# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a job, here or over the Slurm allocation that this runs in, and ends them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rdma_kv_cache.cluster import guardian, launcher
from rdma_kv_cache.cluster.launcher import ClusterError
from rdma_kv_cache.cluster.vllm_process import KILL_TIMEOUT_S, describe_exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdma_kv_cache.cluster.run_dir import RunDir, RunState
    from rdma_kv_cache.config import JobConfig

POLL_S = 0.1
STOP_TIMEOUT_S = 60.0
# After the orderly way failed: what the launcher gets to end its ranks before all are killed.
TERMINATE_TIMEOUT_S = 5.0
LOG_TAIL_LINES = 15
LOG_TAIL_BYTES = 16384


class Cluster:
    """The ranks of one job, started on entry and ended on exit, whatever happens.

    `job_file` holds `job` after all overrides; every rank reads it. If this process dies, all
    ranks and their vLLM are killed. Enter it from a thread that lives as long as the cluster.
    """

    def __init__(self, job_file: Path, job: JobConfig, run_dir: RunDir) -> None:
        self._job_file = job_file
        self._job = job
        self.run_dir = run_dir
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Cluster:
        self.run_dir.create()
        rank = ["rank", "--config", str(self._job_file.absolute())]
        rank += ["--run-dir", str(self.run_dir.path)]
        launch = launcher.choose(self._job, rank, self.run_dir.path, os.environ)
        for name, text in launch.files.items():
            script = self.run_dir.path / name
            script.write_text(text)
            script.chmod(0o700)
        with self.run_dir.launcher_log.open("ab") as log:
            self._process = subprocess.Popen(
                guardian.guarded(launch.command, os.getpid()),
                env=launcher.environment_for(launch, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The orchestrator's URL; "" before it has bound its port."""
        state = self.run_dir.read_state()
        return "" if state is None else state.url

    @property
    def api_key(self) -> str | None:
        """The key that clients must send; None if the job has none."""
        return self.run_dir.read_api_key()

    def wait_ready(self, timeout_s: float, on_stage: Callable[[str], None] | None = None) -> None:
        """Wait until the run is READY; `on_stage` is called with each new stage of the start.

        Raises ClusterError if it fails, ends, or is not ready after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        stage = ""
        while True:
            state = self._check()
            if state is not None and state.stage != stage:
                stage = state.stage
                if on_stage is not None:
                    on_stage(stage)
            if state is not None and state.state == "READY":
                return
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"not ready after {timeout_s:g} s; stage: {stage or 'MPI start'}"
                )
            time.sleep(POLL_S)

    def wait(self) -> None:
        """Wait until the run ends by itself. Raises ClusterError if it fails."""
        while True:
            state = self._check(is_end_expected=True)
            if state is not None and state.state == "DONE":
                return
            time.sleep(POLL_S)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the run: orderly within `timeout_s`, else by force. Nothing of it is left."""
        process = self._process
        if process is None:
            return
        self._process = None
        if process.poll() is None:
            self._ask_to_end(process)
            if not _has_ended(process, timeout_s):
                process.send_signal(signal.SIGTERM)  # passed on to every rank
            if not _has_ended(process, TERMINATE_TIMEOUT_S):
                process.send_signal(guardian.KILL_ALL)
            if not _has_ended(process, KILL_TIMEOUT_S):
                raise ClusterError(
                    f"processes of the run did not end within {KILL_TIMEOUT_S:g} s of SIGKILL: "
                    f"{guardian.descendants(process.pid)}"
                )

    def _ask_to_end(self, process: subprocess.Popen[str]) -> None:
        """Send SIGTERM to rank 0, which drains and stops the others; else to the launcher.

        Rank 0 is on this host: Slurm runs the batch script on the first node of the first
        component. An srun that gets SIGTERM itself kills all ranks at once.
        """
        state = self.run_dir.read_state()
        if state is None or state.host != socket.gethostname() or not self._is_rank(state.pid):
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(state.pid, signal.SIGTERM)

    def _is_rank(self, pid: int) -> bool:
        """Whether `pid` is a rank of this run, and not a later process of that number."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return os.fsencode(self.run_dir.path) in words

    def _check(self, is_end_expected: bool = False) -> RunState | None:
        """Return the run's state. Raises ClusterError if it has failed or its processes ended."""
        if self._process is None:
            raise ClusterError("the cluster is not running")
        code = self._process.poll()
        state = self.run_dir.read_state()
        if state is not None and state.state == "FAILED":
            raise ClusterError(f"the run failed: {state.reason}")
        is_orderly = is_end_expected and state is not None and state.state == "DONE"
        if code is not None and not is_orderly:
            raise ClusterError(
                f"the launcher {describe_exit(code)} before the run was over; "
                f"{self.run_dir.launcher_log} ends with:\n{_tail(self.run_dir.launcher_log)}"
            )
        return state


def _has_ended(process: subprocess.Popen[str], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])
