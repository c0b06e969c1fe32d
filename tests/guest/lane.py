# SPDX-License-Identifier: Apache-2.0
"""What the two kinds of guests have in common."""

from __future__ import annotations

import os
import signal
import subprocess
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.guest.host import command

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.guest.machine import Spec


class Lane(ABC):
    """Starts the guests of a run and holds their processes."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    @staticmethod
    @abstractmethod
    def check() -> None:
        """Raises GuestUnavailableError if a guest cannot start on this host."""

    @abstractmethod
    def start(self) -> None:
        """Starts every node."""

    @abstractmethod
    def set_link(self, node: int, rail: int, *, on: bool) -> None:
        """Plugs the cable of a node's rail in or out."""

    def signal(self, node: int, number: signal.Signals) -> None:
        """Signals a guest's process group, if it is still there."""
        process = self.processes[node]
        if process.poll() is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def running(self) -> set[int]:
        """The nodes whose guests have not ended."""
        return {node for node, process in enumerate(self.processes) if process.poll() is None}

    def close(self) -> None:
        """Ends every guest; may be called again."""
        for node, process in enumerate(self.processes):
            self.signal(node, signal.SIGKILL)
            process.wait()

    def _spawn(
        self,
        name: str,
        argv: Sequence[str],
        fds: Sequence[int],
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A process in a group of its own, which dies with the thread that called this."""
        with (self.folder / f"{name}.console").open("wb") as console:
            return subprocess.Popen(
                [command("setpriv"), "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
                env=env,
                start_new_session=True,
            )
