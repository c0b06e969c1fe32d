# SPDX-License-Identifier: Apache-2.0
"""Progress for people: a bar on a terminal, a line every few seconds in a job's log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

if TYPE_CHECKING:
    from rich.console import Console
    from typing_extensions import Self

    from rdma_kv_cache.batch.tally import Tally

LINE_INTERVAL_S = 5.0


class Display:
    """Shows done/total, output tokens/s and ETA on `console`. Use as a context manager."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._next_line = 0.0
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, tally: Tally, *, last: bool = False) -> None:
        """Show the state; cheap enough to be called twice a second."""
        elapsed_s = tally.elapsed_s()
        finished = tally.ok + tally.failed
        remaining = self._total - done
        eta = clock(remaining * elapsed_s / finished) if finished else "?"
        text = f"{tally.output_tokens / elapsed_s:.1f} output tokens/s, ETA {eta}"
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif last or now >= self._next_line:
            self._next_line = now + LINE_INTERVAL_S
            self._console.print(f"{done}/{self._total} done, {text}", soft_wrap=True)


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
