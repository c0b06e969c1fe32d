# SPDX-License-Identifier: Apache-2.0
"""One machine of a lab: namespaces under a process 1 of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.slurm import namespaces
from tests.slurm.conf import MUNGE_SOCKET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.slurm.conf import Node

NODE_SCRIPT = Path(__file__).with_name("node.sh")
BOOT_TIMEOUT_S = 20.0


class LabError(RuntimeError):
    """Something of the lab did not do what it should; the text has what it said."""


def poll(condition: Callable[[], object], timeout_s: float, every_s: float = 0.05) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


class Machine:
    """Started once; a reboot is another one of the same name."""

    def __init__(self, node: Node, folder: Path, keeper: int, shared: Sequence[Path]) -> None:
        self.node = node
        self.pid = 0
        """Of its process 1, as this process sees it."""
        self._folder = folder
        self._own = folder / node.name
        self._keeper = keeper
        self._shared = shared

    def start(self, env: Mapping[str, str], wire: Callable[[Machine], None] | None = None) -> None:
        """Returns when it is up; `wire` gives it a network. Raises LabError."""
        self._own.mkdir(exist_ok=True)
        for name in ("pid", "up", "slurmd.pid"):
            (self._own / name).unlink(missing_ok=True)
        arguments = [self.node.name, self.node.address, self._folder, MUNGE_SOCKET, *self._shared]
        with (self._own / "node.log").open("w") as log:
            self._process = subprocess.Popen(
                [*namespaces.new_in(self._keeper), "bash", NODE_SCRIPT, *map(str, arguments)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_for("pid")
        self.pid = int((self._own / "pid").read_text())
        if wire is not None:
            wire(self)
        self._wait_for("up")

    def is_up(self) -> bool:
        """Whether it has not crashed."""
        return self._process.poll() is None

    def crash(self) -> None:
        """Kills all of its processes at once."""
        if self.is_up():
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait()

    def _wait_for(self, name: str) -> None:
        file = self._own / name
        poll(lambda: file.exists() or not self.is_up(), BOOT_TIMEOUT_S, 0.01)
        if not file.exists():
            log = (self._own / "node.log").read_text(errors="replace")
            raise LabError(f"{self.node.name} does not come up: {log}")
