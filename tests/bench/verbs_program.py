# SPDX-License-Identifier: Apache-2.0
"""A program that takes orders, one a line, and answers each with a line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TIMEOUT_S = 300.0
KEPT_ERRORS_CHARS = 2000


class Program:
    """Starts it; `greeting` is its first line. Every failure is a RuntimeError with its stderr."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = " ".join(command)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **(environment or {})},
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self.greeting = self._receive()

    def pause(self) -> None:
        """Stops all of its processes: an idle NIXL agent polls, and would take others' turns."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def ask(self, order: str) -> Any:
        """The answer to an order."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(order + "\n")
        except BrokenPipeError:
            self._fail(f"ended before {order!r}")
        return self._receive()

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT_S):
                self._fail(f"gave no answer within {TIMEOUT_S:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self._fail("ended")
        return json.loads(line)

    def _fail(self, what: str) -> None:
        self.process.kill()
        status = self.process.wait()
        self.errors.seek(0)
        errors = self.errors.read()[-KEPT_ERRORS_CHARS:]
        raise RuntimeError(f"{self.command}: {what} (status {status})\n{errors}")

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()
