# SPDX-License-Identifier: Apache-2.0
"""Runs a command in each of some guests, and does to them what can happen to a node."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import threading
import time
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

from tests.guest.folder import RunFolder
from tests.guest.host import GuestUnavailableError
from tests.guest.machine import Spec
from tests.guest.qemu import QemuLane
from tests.guest.result import DIED, TIMED_OUT, GuestRun
from tests.guest.uml import UmlLane

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.guest.lane import Lane

POLL_S = 0.05

logger = logging.getLogger(__name__)


@lru_cache
def why_not(*, uml: bool = False) -> str | None:
    """Why no guest can start on this host, for a skip; None if it can. Fetches the kernel."""
    try:
        (UmlLane if uml else QemuLane).check()
    except (GuestUnavailableError, OSError) as error:  # OSError: the cache cannot be written
        return str(error)
    return None


def run_guests(command: str | Sequence[str], **options: Any) -> GuestRun:
    """Runs a command in guests to its end; the options are those of Guests."""
    with Guests(command, **options) as guests:
        return guests.wait()


def default_smp(nodes: int, *, uml: bool) -> int:
    """CPUs of a guest; two let two polling processes of a single guest run at the same time."""
    return min(2, os.cpu_count() or 1) if nodes == 1 and not uml else 1


class Guests:
    """Guests that all run one command, as a context manager; when it ends, they do.

    They also die with the thread that entered it, whatever that dies of.
    A guest does to its fellows what the methods do by appending a line to /io/ctl: `kill NODE`,
    `stop NODE`, `cont NODE`, `link NODE off|on [RAIL]`.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        nodes: int = 1,
        rails: int = 1,
        memory_mib: int = 1024,
        smp: int | None = None,
        timeout_s: float = 300.0,
        uml: bool = False,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """A string is for the shell. `folder` is /io in the guests; it is kept if it is given."""
        self._spec = Spec(nodes, rails, memory_mib, smp or default_smp(nodes, uml=uml))
        self._command = command if isinstance(command, str) else shlex.join(command)
        self._env = dict(env or {})
        self._timeout_s = timeout_s
        self._lane_type: type[Lane] = UmlLane if uml else QemuLane
        self._given_folder = folder
        self._killed: set[int] = set()
        self._error: Exception | None = None
        self._late: set[int] = set()
        self._over = threading.Event()

    def __enter__(self) -> Guests:
        self._began = time.monotonic()
        with ExitStack() as undo:
            path = self._given_folder or undo.enter_context(TemporaryDirectory(prefix="guest."))
            self.folder = RunFolder(Path(path).resolve())
            self.folder.fill(self._spec, self._command, self._env)
            self._lane = self._lane_type(self._spec, self.folder.path)
            undo.callback(self._lane.close)
            self._lane.start()
            self._undo = undo.pop_all()
        self._watcher = threading.Thread(target=self._watch, name="guests", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self._undo.close()

    def kill(self, node: int) -> None:
        """Cuts the node's power."""
        self._signal(node, signal.SIGKILL)
        self._killed.add(node)

    def stop(self, node: int) -> None:
        """Freezes the node."""
        self._signal(node, signal.SIGSTOP)

    def cont(self, node: int) -> None:
        """Thaws the node."""
        self._signal(node, signal.SIGCONT)

    def link(self, node: int, on: bool, rail: int = 0) -> None:
        """Plugs the cable of the node's rail in or out; not with User-Mode Linux."""
        if self._spec.nodes < 2 or rail not in range(self._spec.rails):
            raise ValueError(f"no cable of rail {rail}")
        logger.info("link %d %s %d", self._checked(node), "on" if on else "off", rail)
        self._lane.set_link(node, rail, on=on)

    def _signal(self, node: int, number: signal.Signals) -> None:
        logger.info("%s to node %d", number.name, self._checked(node))
        self._lane.signal(node, number)

    def _checked(self, node: int) -> int:
        if node not in range(self._spec.nodes):
            raise ValueError(f"no node {node}")
        return node

    def running(self) -> bool:
        """Whether a guest still runs."""
        return self._watcher.is_alive()

    def read_output(self, node: int) -> str:
        """What the command has written on a node so far."""
        return self.folder.read_output(node)

    def wait_for_output(self, node: int, text: str, timeout_s: float = 60.0) -> None:
        """Returns when a node has written the text; RuntimeError if that comes to nothing."""
        deadline = time.monotonic() + timeout_s
        waiting = True
        while waiting:
            waiting = self.running() and time.monotonic() < deadline
            if text in self.read_output(node):
                return
            time.sleep(POLL_S)
        said = self.read_output(node) + self.folder.read_console(node)
        raise RuntimeError(f"node {node} did not write {text!r} but:\n{said}") from self._error

    def wait(self) -> GuestRun:
        """Returns when all guests have ended, at the latest after the time limit."""
        self._watcher.join()
        if self._error is not None:
            raise self._error
        return self._result()

    def _result(self) -> GuestRun:
        nodes = range(self._spec.nodes)
        return GuestRun(
            rc=tuple(map(self._exit_code, nodes)),
            output=tuple(map(self.folder.read_output, nodes)),
            console=tuple(map(self.folder.read_console, nodes)),
            ready_s=tuple(map(self.folder.read_ready, nodes)),
            killed=frozenset(self._killed),
            wall_s=time.monotonic() - self._began,
        )

    def _exit_code(self, node: int) -> int:
        status = self.folder.read_status(node)
        if status is None:
            return TIMED_OUT if node in self._late else DIED
        return status

    def _watch(self) -> None:
        """The watcher thread: obeys the control file, keeps the time limit, ends the guests."""
        try:
            with self.folder.control.open() as control:
                self._watch_until_end(control)
        except Exception as error:  # noqa: BLE001 - wait() raises it
            self._error = error
        finally:
            self._lane.close()

    def _watch_until_end(self, control: TextIO) -> None:
        line = ""
        while running := self._lane.running():
            while part := control.readline():
                line += part
                if line.endswith("\n"):
                    self.obey(line)
                    line = ""
            if self._over.wait(POLL_S):
                return
            if time.monotonic() - self._began > self._timeout_s:
                self._late = running
                return

    def obey(self, line: str) -> None:
        """Does what a line of the control file says; ValueError if it cannot be read."""
        match line.split():
            case ["kill" | "stop" | "cont" as verb, node]:
                getattr(self, verb)(int(node))
            case ["link", node, "on" | "off" as state, *rail]:
                self.link(int(node), state == "on", *map(int, rail))
            case _:
                raise ValueError(f"/io/ctl: cannot read {line!r}")
