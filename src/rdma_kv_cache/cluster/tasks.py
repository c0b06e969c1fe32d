# SPDX-License-Identifier: Apache-2.0
"""A cancel that surely ends a task."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

RECANCEL_S = 0.2


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended; what they raise is dropped.

    More than once, because wait_for drops a cancellation that comes together with its result
    (Python before 3.12), and the task then runs on.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        ended, pending = await asyncio.wait(pending, timeout=RECANCEL_S)
        for task in ended:
            if not task.cancelled():
                task.exception()
