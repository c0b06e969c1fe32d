# SPDX-License-Identifier: Apache-2.0
"""The folder of one run, which the guests see as /io."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.guest.machine import Spec

BOOT = Path(__file__).with_name("boot.sh")

# What the command sees of the host's environment: names, and beginnings of names.
FORWARDED = (
    "PATH", "HOME", "USER", "LANG", "LC_", "CI", "LD_LIBRARY_PATH", "PYTHON", "PYTEST",
    "VIRTUAL_ENV", "OPENBLAS", "OMP_", "ASAN_", "LSAN_", "TSAN_", "UBSAN_",
)  # fmt: skip

CONSOLE_TAIL = 3000  # characters


class RunFolder:
    """Knows every file of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.control = path / "ctl"

    def output(self, node: int) -> Path:
        """What the command writes."""
        return self.path / f"node{node}.out"

    def fill(self, spec: Spec, command: str, env: Mapping[str, str]) -> None:
        """Writes what the guests read; replaces what an earlier run left."""
        if (self.path / BOOT.name).exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.iterdir()):
            raise FileExistsError(f"{self.path} is neither empty nor the folder of an earlier run")
        shutil.copy(BOOT, self.path)
        own = {
            "GUEST_NODES": str(spec.nodes),
            "GUEST_RAILS": str(spec.rails),
            "GUEST_FOLDER": str(Path.cwd()),
        }
        lines = exports({**forwarded(os.environ), **env, **own})
        (self.path / "environment").write_text(lines)
        (self.path / "command.sh").write_text(command + "\n")
        self.control.touch()
        for node in range(spec.nodes):
            self.output(node).touch()

    def read_output(self, node: int) -> str:
        """What the command has written so far."""
        return self.output(node).read_text(errors="replace")

    def read_console(self, node: int) -> str:
        """The end of what the kernel and boot.sh said."""
        text = (self.path / f"node{node}.console").read_text(errors="replace")
        return text[-CONSOLE_TAIL:]

    def read_status(self, node: int) -> int | None:
        """The command's exit status, if it came to its end."""
        status = self.path / f"node{node}.status"
        return int(status.read_text()) if status.exists() else None

    def read_ready(self, node: int) -> float | None:
        """Seconds from the guest's start until its rails were there."""
        ready = self.path / f"node{node}.ready"
        return float(ready.read_text()) if ready.exists() else None


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the host's environment the guests get."""
    return {name: text for name, text in environment.items() if name.startswith(FORWARDED)}


def exports(environment: Mapping[str, str]) -> str:
    """Shell lines that export an environment."""
    return "".join(f"export {name}={shlex.quote(text)}\n" for name, text in environment.items())
