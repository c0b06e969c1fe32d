# SPDX-License-Identifier: Apache-2.0
"""Ends a lab with the process that started it, whatever that dies of."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from tests.slurm.machine import LabError

if TYPE_CHECKING:
    from pathlib import Path

# Process 1 of a PID namespace that holds those of all machines, so that the kernel kills them all
# when it ends. It ends with its input, which this process alone holds open.
_FIRST_PROCESS = 'read -r pid _ < /proc/self/stat; echo "$pid"; read -r _'
# unshare returns when all are dead.
_KEEPER = 'unshare --pid --fork --kill-child bash -c "$1"; rm -rf -- "$2"'
END_TIMEOUT_S = 30.0


class Keeper:
    """Holds a lab's processes and its folder; a context manager that ends and removes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Keeper:
        self._process = subprocess.Popen(
            ["bash", "-c", _KEEPER, "keeper", _FIRST_PROCESS, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            self._close()
            raise LabError("unshare --pid failed")
        self.pid = int(said)
        """Of process 1 of the namespace, as this process sees it."""
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._process.communicate(timeout=END_TIMEOUT_S)
