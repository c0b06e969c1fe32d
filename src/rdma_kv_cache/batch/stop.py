# SPDX-License-Identifier: Apache-2.0
"""SIGINT, SIGTERM and SIGUSR1 as events: the first stops, the second abandons what is in flight.

SIGUSR1 is Slurm's warning that the time limit is near (sbatch --signal=B:USR1@...).
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Handles the signals while entered. `number` is the first signal's, 0 before it."""

    def __init__(self, on_stop: Callable[[str], None]) -> None:
        self.number = 0
        self.stop = asyncio.Event()
        self.abandon = asyncio.Event()
        self._on_stop = on_stop

    def __enter__(self) -> Self:
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._handle, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    async def guard(self, task: asyncio.Task[None], drain_timeout_s: float) -> None:
        """Wait for `task`; once stopped, at most `drain_timeout_s` longer, then cancel it.

        Raises what the task raised.
        """
        stop = asyncio.create_task(self.stop.wait())
        abandon = asyncio.create_task(self.abandon.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(
                {task, abandon}, timeout=drain_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for each in (task, stop, abandon):
                each.cancel()
            await asyncio.gather(task, stop, abandon, return_exceptions=True)
        if not task.cancelled():
            task.result()

    def _handle(self, number: signal.Signals) -> None:
        if self.stop.is_set():
            self.abandon.set()
            return
        self.number = int(number)
        self.stop.set()
        self._on_stop(number.name)
