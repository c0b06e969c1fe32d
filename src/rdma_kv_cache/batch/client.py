# SPDX-License-Identifier: Apache-2.0
"""One request to an OpenAI-compatible server, with bounded retries."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from rdma_kv_cache.batch.errors import BatchError, ServerGoneError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rdma_kv_cache.batch.lines import Request

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 15.0
RETRY_AFTER_MAX_S = 60.0
# The first request finds a server that is up, or a wrong URL.
FIRST_CONTACT_S = 10.0
# A 500 is mostly the request's own doing; 429, 502, 503 and 504 tell of the server's state.
MAX_ATTEMPTS_ON_500 = 4
_PASSING = {429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Without an HTTP answer `status` is None and `error` says why."""

    status: int | None
    body: Any = None
    request_id: str = ""
    error: str = ""
    retryable: bool = False

    @property
    def ok(self) -> bool:
        """Whether the server answered with success."""
        return self.status is not None and 200 <= self.status < 300


class Client:
    """Sends requests to `base_url` (without /v1). Times are in seconds.

    `why_gone` is asked after each failure: any text means that the server will not come back.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        *,
        request_timeout_s: float,
        retry_deadline_s: float,
        why_gone: Callable[[], str] = str,
    ) -> None:
        self._session = session
        self._base_url = base_url
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, sock_connect=30)
        self._retry_deadline_s = retry_deadline_s
        self._why_gone = why_gone
        self._last_answer = time.monotonic()

    async def post(self, request: Request) -> Outcome:
        """Send `request` until it has an answer that retrying cannot change.

        Retries begin with the first failure and end `retry_deadline_s` later. Raises
        ServerGoneError if the server gave no answer to any request in all that time, or is known
        to be gone.
        """
        attempt = 0
        first_failure = 0.0
        while True:
            outcome, retry_after_s = await self._attempt(request)
            attempt += 1
            if not outcome.retryable:
                return outcome
            if reason := self._why_gone():
                raise ServerGoneError(reason)
            now = time.monotonic()
            first_failure = first_failure or now
            pause = retry_after_s if retry_after_s is not None else _backoff(attempt)
            spent = outcome.status == 500 and attempt >= MAX_ATTEMPTS_ON_500
            if spent or now + pause > first_failure + self._retry_deadline_s:
                if outcome.status is None and self._last_answer < first_failure:
                    silence = f"has not answered for {now - self._last_answer:.0f} s"
                    raise ServerGoneError(f"{self._base_url} {silence} ({outcome.error})")
                return outcome
            await asyncio.sleep(pause)

    async def served_model(self) -> str:
        """Return the id of the first model that the server lists. Raises BatchError."""
        url = f"{self._base_url}/v1/models"
        deadline = time.monotonic() + min(FIRST_CONTACT_S, self._retry_deadline_s)
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._session.get(url, timeout=self._timeout) as response:
                    data = await response.read()
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                problem = _describe(error)
            else:
                if response.status == 200:
                    return _first_model(url, data)
                problem = f"HTTP {response.status} {data[:200].decode(errors='replace')}"
                if response.status not in _PASSING:
                    raise BatchError(f"GET {url}: {problem}.{_remedy(response.status)}")
            pause = _backoff(attempt)
            if time.monotonic() + pause > deadline:
                raise BatchError(f"GET {url}: {problem}. Is the server up and the URL right?")
            await asyncio.sleep(pause)

    async def _attempt(self, request: Request) -> tuple[Outcome, float | None]:
        try:
            async with self._session.post(
                self._base_url + request.url, json=request.body, timeout=self._timeout
            ) as response:
                data = await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return Outcome(None, error=_describe(error), retryable=True), None
        self._last_answer = time.monotonic()
        try:
            body = json.loads(data)
        except ValueError:
            if response.ok:
                problem = f"HTTP {response.status}, but the body is not JSON: {data[:80]!r}"
                return Outcome(None, error=problem, retryable=True), None
            body = data.decode(errors="replace")
        passing = response.status in _PASSING
        request_id = response.headers.get("X-Request-Id", "")
        outcome = Outcome(response.status, body, request_id, retryable=passing)
        return outcome, _retry_after(response.headers) if passing else None


def _backoff(attempt: int) -> float:
    longest = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 10))
    return longest * random.uniform(0.5, 1.0)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the pause that Retry-After asks for (seconds or an HTTP date), bounded."""
    text = headers.get("Retry-After", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), RETRY_AFTER_MAX_S)


def _first_model(url: str, data: bytes) -> str:
    try:
        return str(json.loads(data)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise BatchError(f"GET {url}: not an OpenAI model list: {data[:80]!r}.") from error


def _describe(error: BaseException) -> str:
    return "no answer within the request timeout" if not str(error) else str(error)


def _remedy(status: int) -> str:
    if status in (401, 403):
        return " Give the key by --api-key-file or RDMA_KV_API_KEY."
    return " Is this the URL of an OpenAI-compatible server?"
