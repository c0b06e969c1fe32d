# SPDX-License-Identifier: Apache-2.0
"""One stock vLLM server as a child process: the reference that the product is compared with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
MODEL = REPO / "models" / "smollm2-135m"
START_TIMEOUT_S = 300.0


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rest_between_polls() -> None:
    time.sleep(0.25)


class VllmServer:
    """`with VllmServer(log, core="0", args=[…]) as server:`, then `server.url`.

    `core` is for vLLM's CPU build; "" leaves the choice to it.
    Raises RuntimeError with the end of the log if the server does not become healthy.
    """

    def __init__(
        self,
        log: Path,
        *,
        core: str = "",
        args: list[str],
        model: Path = MODEL,
        kv_transfer: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._argv = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model), "--served-model-name", model.name,
            "--host", "127.0.0.1", "--port", str(self.port), *args,
        ]  # fmt: skip
        if kv_transfer is not None:
            self._argv += ["--kv-transfer-config", json.dumps(kv_transfer)]
        self._env = {
            **os.environ,
            **({"VLLM_CPU_OMP_THREADS_BIND": core} if core else {}),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **(env or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VllmServer:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start without waiting."""
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                self._argv, env=self._env, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Wait until /health answers 200."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                rest_between_polls()
        tail = self.log.read_text(errors="replace")[-3000:]
        self.stop()
        raise RuntimeError(f"vLLM did not become healthy; the end of {self.log}:\n{tail}")

    def signal(self, sig: signal.Signals) -> None:
        """Send a signal to the server and everything it started."""
        assert self._process is not None
        os.killpg(self._process.pid, sig)

    def stop(self) -> None:
        """End the server and everything it started."""
        if self._process is None:
            return
        for sig in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
            try:
                self.signal(sig)
                if sig == signal.SIGCONT:
                    continue
                self._process.wait(timeout=15)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        self._process = None
