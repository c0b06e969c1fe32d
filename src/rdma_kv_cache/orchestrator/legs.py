# SPDX-License-Identifier: Apache-2.0
"""One leg of a request: the HTTP exchange between this gateway and one engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdma_kv_cache.orchestrator.engines import Engine

CONNECT_TIMEOUT_S = 5.0
# Uvicorn closes idle connections after 5 s; reusing one at that moment loses the request.
KEEPALIVE_S = 2.0
# An engine answers these when it is in trouble itself; other 4xx are about the client's request.
_ENGINE_TROUBLE = frozenset({401, 403, 408, 429})


class LegError(Exception):
    """A leg that failed at `engine`, with the reason; the request may be tried elsewhere."""

    def __init__(self, engine: Engine, reason: str) -> None:
        super().__init__(f"{engine.name}: {reason}")
        self.engine = engine


@dataclass(frozen=True)
class Answer:
    """An engine's answer: all of it, or for a stream its first bytes."""

    status: int
    content_type: str
    body: bytes
    streaming: bool

    @property
    def engine_failed(self) -> bool:
        """Whether the status tells of the engine's trouble, not of a wrong request."""
        return self.status >= 500 or self.status in _ENGINE_TROUBLE


def open_session(engine_key: str) -> aiohttp.ClientSession:
    """Return the session for all legs. `engine_key` is the engines' own API key."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        headers={"Authorization": f"Bearer {engine_key}", "Accept-Encoding": "identity"},
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
    )


class Leg:
    """Counts at its engine from construction to `close`, which also ends the exchange.

    Closing the connection makes vLLM abort the request and free its KV blocks.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        engine: Engine,
        path: str,
        body: dict[str, Any],
        request_id: str,
        timeout_s: float,
    ) -> None:
        self.engine = engine
        self._session = session
        self._url = engine.url + path
        self._body = body
        self._headers = {"X-Request-Id": request_id, "Content-Type": "application/json"}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._timeout_s = timeout_s
        self._task: asyncio.Task[Answer] | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._aborted = ""
        engine.legs.add(self)

    def start(self) -> asyncio.Task[Answer]:
        """Send the request; the task ends with the Answer, or raises LegError."""
        self._task = asyncio.ensure_future(self._exchange())
        return self._task

    async def read_chunk(self) -> bytes:
        """Return the stream's next bytes as they arrive, b"" at its end. Raises LegError."""
        assert self._response is not None
        with self._named_errors():
            chunk = await self._response.content.readany()
        self.engine.last_answer = time.monotonic()
        return chunk

    def abort(self, reason: str) -> None:
        """End the exchange because the engine is out of service."""
        self._aborted = reason
        self.close()

    def close(self) -> None:
        """End the exchange, whatever its stage; harmless when it has ended."""
        self.engine.legs.discard(self)
        if self._task is not None and not self._task.done():
            self._task.cancel()
        if self._response is not None:
            self._response.close()

    async def _exchange(self) -> Answer:
        with self._named_errors():
            response = await self._session.post(
                self._url,
                data=json.dumps(self._body, separators=(",", ":")).encode(),
                headers=self._headers,
                timeout=self._timeout,
                allow_redirects=False,
            )
            self._response = response
            content_type = response.headers.get("Content-Type", "application/json")
            streaming = content_type.startswith("text/event-stream")
            body = await (response.content.readany() if streaming else response.read())
        self.engine.last_answer = time.monotonic()
        if streaming and not body:
            raise LegError(self.engine, f"HTTP {response.status}, and the stream ended empty")
        return Answer(response.status, content_type, body, streaming)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            if not self._aborted:
                raise
            raise LegError(self.engine, self._aborted) from None
        except asyncio.TimeoutError as error:
            reason = str(error) or f"no answer within {self._timeout_s:.0f} s"
            raise LegError(self.engine, self._aborted or reason) from error
        except (aiohttp.ClientError, OSError) as error:
            reason = self._aborted or f"{type(error).__name__}: {error}"
            raise LegError(self.engine, reason) from error


def failure(engine: Engine, answer: Answer) -> LegError:
    """Return the LegError that tells of an `answer` with a bad status."""
    excerpt = answer.body[:300].decode("utf-8", "replace")
    return LegError(engine, f"HTTP {answer.status}: {excerpt}")
