# SPDX-License-Identifier: Apache-2.0
"""After another run has taken over: new requests go there, until this one ends."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from rdma_kv_cache.orchestrator.errors import ApiError

if TYPE_CHECKING:
    from rdma_kv_cache.cluster.run_dir import RunDir

log = logging.getLogger(__name__)

POLL_S = 0.5
CONNECT_TIMEOUT_S = 5.0
_CHUNK_BYTES = 64 << 10
# Of one connection (RFC 9110, 7.6.1), or set anew.
_NOT_PASSED_ON = frozenset(
    {
        "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host",
        "content-length", "proxy-authenticate", "proxy-authorization",
    }
)  # fmt: skip


class Handover:
    """Watches the run folder for the successor's URL, and forwards requests to it."""

    def __init__(self, run_dir: RunDir, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self.url = ""
        """Where new requests go; "" while this run serves them itself."""
        self._run_dir = run_dir
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)

    async def watch(self) -> None:
        """Return as soon as there is a successor."""
        while not self.url:
            await asyncio.sleep(POLL_S)
            self.url = self._run_dir.read_handover()
        log.info("new requests go to %s", self.url)

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on, and its answer back as it comes. Raises ApiError.

        The client's own key goes along: all jobs of a service have the same.
        """
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _NOT_PASSED_ON}
        headers.setdefault("Authorization", "")  # never the session's own, which is the engines'
        body = await request.read()
        try:
            async with self._session.request(
                request.method,
                self.url + request.path_qs,
                headers=headers,
                data=body,
                timeout=self._timeout,
            ) as answer:
                return await _pass_back(request, answer)
        except (aiohttp.ClientConnectorError, asyncio.TimeoutError) as error:
            raise ApiError(
                503,
                "handed_over",
                f"the service has moved to {self.url}: {type(error).__name__}: {error}",
                retry_after_s=1,
            ) from error


async def _pass_back(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    headers = {k: v for k, v in answer.headers.items() if k.lower() not in _NOT_PASSED_ON}
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
        await response.write(chunk)
    await response.write_eof()
    return response
