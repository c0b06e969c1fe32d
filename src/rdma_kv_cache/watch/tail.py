# SPDX-License-Identifier: Apache-2.0
"""The last lines of log files, and what is added to them."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# "[3] text" of mpiexec -prepend-rank, "3: text" and " 3: text" of srun --label.
_OF_RANK = re.compile(rb"(?:\[(\d+)\]|\s*(\d+):) ?")


class LogFile:
    """One log file, or the lines of one rank in the launcher's."""

    def __init__(self, title: str, path: Path, rank: int | None = None) -> None:
        self.title = title
        self.path = path
        self._rank = None if rank is None else b"%d" % rank
        self._offset = 0
        self._rest = b""

    def last(self, count: int) -> list[str]:
        """Return the last `count` lines; `more` goes on after them."""
        return list(deque(self.more(), maxlen=count))

    def more(self) -> Iterator[str]:
        """Yield the complete lines that were added since the last call."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            size = file.seek(0, 2)
            if size < self._offset:  # begun anew
                self._offset, self._rest = 0, b""
            file.seek(self._offset)
            for line in file:
                self._offset += len(line)
                line = self._rest + line
                if not line.endswith(b"\n"):
                    self._rest = line
                    return
                self._rest = b""
                if (text := self._chosen(line)) is not None:
                    yield text.decode(errors="replace").rstrip("\r\n")

    def _chosen(self, line: bytes) -> bytes | None:
        if self._rank is None:
            return line
        found = _OF_RANK.match(line)
        if found is None or self._rank not in found.groups():
            return None
        return line[found.end() :]
