# SPDX-License-Identifier: Apache-2.0
"""Blocking calls beside asyncio."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


async def in_thread(call: Callable[[], _T]) -> _T:
    """Await a blocking call.

    Its thread is a daemon: an executor's threads are joined at exit, and an MPI collective may
    outlive the rank's decision to end.
    """
    future: Future[_T] = Future()

    def work() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
            future.set_exception(error)

    threading.Thread(target=work, name="blocking-call", daemon=True).start()
    return await asyncio.wrap_future(future)
