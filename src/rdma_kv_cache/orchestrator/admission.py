# SPDX-License-Identifier: Apache-2.0
"""How many requests are let in at once, and none while the service drains."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rdma_kv_cache.orchestrator.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_AFTER_S = 1
DRAIN_RETRY_AFTER_S = 30


class Admission:
    """Counts the requests in flight and refuses those above `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inflight = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place. Raises ApiError 429 (full) or 503 (draining), with Retry-After."""
        if self.draining:
            raise ApiError(
                503,
                "draining",
                "the service is shutting down and takes no new requests",
                retry_after_s=DRAIN_RETRY_AFTER_S,
            )
        if self.inflight >= self.limit:
            raise ApiError(
                429,
                "too_many_requests",
                f"{self.inflight} requests are in flight, the limit is {self.limit} "
                "(orchestrator.max_inflight); try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        self.inflight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.inflight -= 1
            if not self.inflight:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Stop admitting; return whether the last request ended within `timeout_s`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True
