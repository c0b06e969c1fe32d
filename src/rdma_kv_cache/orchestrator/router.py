# SPDX-License-Identifier: Apache-2.0
"""The way of a request: choose engines, dispatch, retry, pass the answer through."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING

from aiohttp import web

from rdma_kv_cache.orchestrator.bodies import (
    RESPONSES,
    Body,
    estimate_tokens,
    is_one_sequence,
    parse_body,
)
from rdma_kv_cache.orchestrator.dispatch import Attempt, attempt
from rdma_kv_cache.orchestrator.errors import ApiError
from rdma_kv_cache.orchestrator.legs import LegError
from rdma_kv_cache.orchestrator.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import aiohttp

    from rdma_kv_cache.config import OrchestratorConfig
    from rdma_kv_cache.orchestrator.engines import Engine, Registry
    from rdma_kv_cache.orchestrator.metrics import Metrics

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
RETRY_PAUSE_S = 0.2
RETRY_AFTER_S = 2


class Router:
    """Serves the POST routes. `started` per request is `time.monotonic()` at its arrival."""

    def __init__(
        self,
        registry: Registry,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        settings: OrchestratorConfig,
    ) -> None:
        self._registry = registry
        self._session = session
        self._metrics = metrics
        self._settings = settings
        self._policy = POLICIES[settings.policy]
        self._turn = 0

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer one client. Raises ApiError before anything was sent; cancellation ends both legs.

        An engine that fails before the first byte costs another attempt elsewhere, at most
        MAX_ATTEMPTS within `request_timeout_s`; the last one does without prefill.
        """
        started = time.monotonic()
        deadline = started + self._settings.request_timeout_s
        body = parse_body(await _read(request, self._settings.request_timeout_s))
        disaggregate = self._wants_prefill(request.path, body)
        failed: set[str] = set()
        failure: LegError | None = None
        for number in range(1, MAX_ATTEMPTS + 1):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            with_prefill = disaggregate and number < MAX_ATTEMPTS
            prefill, decode = self._choose(failed, with_prefill)
            self._metrics.dispatches.labels("pair" if prefill else "decode_only").inc()
            try:
                async with attempt(
                    self._session, request.path, body, prefill, decode, remaining
                ) as running:
                    return await self._pass_through(request, running, started)
            except LegError as error:
                failure = error
                failed.add(error.engine.name)
                self._metrics.retries.labels(error.engine.role).inc()
                log.warning("attempt %d of %d failed: %s", number, MAX_ATTEMPTS, error)
                if decode.name in failed:
                    await asyncio.sleep(RETRY_PAUSE_S)
        raise self._give_up(failure, deadline)

    def _wants_prefill(self, path: str, body: Body) -> bool:
        if path == RESPONSES or not is_one_sequence(body):
            return False
        threshold = self._settings.disaggregate_above_tokens
        return threshold == 0 or estimate_tokens(body) > threshold

    def _choose(self, failed: set[str], with_prefill: bool) -> tuple[Engine | None, Engine]:
        """Return (prefill or None, decode), where possible none that has `failed`.

        Raises ApiError 503 if no decode engine is READY.
        """
        decodes = self._registry.ready("decode")
        if not decodes:
            raise ApiError(
                503, "no_decode_engine", self.unready_reason(), retry_after_s=RETRY_AFTER_S
            )
        decodes = [engine for engine in decodes if engine.name not in failed] or decodes
        self._turn += 1
        if with_prefill:
            pairs = [
                (prefill, decode)
                for prefill, decode in self._registry.usable_pairs()
                if decode in decodes and prefill.name not in failed
            ]
            if pairs:
                decode = self._pick([decode for _, decode in pairs])
                return self._pick([p for p, other in pairs if other is decode]), decode
        return None, self._pick(decodes)

    def unready_reason(self) -> str:
        """Say why no decode engine can be used."""
        engines = self._registry.of_role("decode")
        states = [
            f"{e.name} is {e.state}" + (f" ({e.reason})" if e.reason else "") for e in engines
        ]
        return "no decode engine is READY: " + ", ".join(states)

    def _pick(self, engines: Sequence[Engine]) -> Engine:
        distinct = list(dict.fromkeys(engines))
        return distinct[self._policy([engine.inflight for engine in distinct], self._turn)]

    async def _pass_through(
        self, request: web.Request, running: Attempt, started: float
    ) -> web.StreamResponse:
        answer = running.answer
        headers = {"Content-Type": answer.content_type, "X-Request-Id": running.request_id}
        if not answer.streaming:
            return web.Response(status=answer.status, body=answer.body, headers=headers)
        self._metrics.ttft.observe(time.monotonic() - started)
        response = web.StreamResponse(status=answer.status, headers=headers)
        response.headers["Cache-Control"] = "no-cache"
        await response.prepare(request)
        chunk = answer.body
        last = b""
        try:
            while chunk:
                await response.write(chunk)
                last = chunk
                chunk = await running.decode.read_chunk()
        except LegError as error:
            log.warning("stream %s ends early: %s", running.request_id, error)
            self._metrics.broken_streams.inc()
            await response.write(_error_event(error, last))
            response.force_close()
        await response.write_eof()
        return response

    def _give_up(self, failure: LegError | None, deadline: float) -> ApiError:
        if time.monotonic() >= deadline:
            limit = self._settings.request_timeout_s
            message = f"no answer within {limit:g} s (orchestrator.request_timeout_s)"
            return ApiError(504, "timeout", f"{message}; last failure: {failure}")
        return ApiError(
            502,
            "engine_failure",
            f"{MAX_ATTEMPTS} attempts failed, the last at {failure}",
            retry_after_s=RETRY_AFTER_S,
        )


async def _read(request: web.Request, timeout_s: float) -> bytes:
    try:
        return await asyncio.wait_for(request.read(), timeout_s)
    except asyncio.TimeoutError as error:
        raise ApiError(408, "timeout", f"the body did not arrive in {timeout_s:g} s") from error


def _error_event(error: LegError, last: bytes) -> bytes:
    """Return the SSE event that tells of a broken stream, after whatever was cut off."""
    api_error = ApiError(502, "engine_failure", f"the answer ends here, {error}")
    boundary = b"" if last.endswith(b"\n\n") else b"\n\n"
    return boundary + b"data: " + json.dumps(api_error.body()).encode() + b"\n\n"
