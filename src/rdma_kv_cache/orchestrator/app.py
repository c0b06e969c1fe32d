# SPDX-License-Identifier: Apache-2.0
"""The HTTP routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from rdma_kv_cache.orchestrator.auth import check_key
from rdma_kv_cache.orchestrator.bodies import CHAT, COMPLETIONS, RESPONSES
from rdma_kv_cache.orchestrator.errors import ApiError
from rdma_kv_cache.orchestrator.state import Progress, describe_engine

if TYPE_CHECKING:
    from rdma_kv_cache.orchestrator.admission import Admission
    from rdma_kv_cache.orchestrator.engines import Registry
    from rdma_kv_cache.orchestrator.handover import Handover
    from rdma_kv_cache.orchestrator.hub import Hub
    from rdma_kv_cache.orchestrator.metrics import Metrics
    from rdma_kv_cache.orchestrator.router import Router

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
CONTROL_PATH = "/internal/control"
_MODELS_TIMEOUT_S = 10.0
# Probes of load balancers carry no key; the control connection has signatures of its own.
_OPEN_PATHS = frozenset({"/health", "/ready", CONTROL_PATH})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Gateway:
    """The parts that the routes work on, and the routes."""

    registry: Registry
    hub: Hub
    router: Router
    admission: Admission
    metrics: Metrics
    session: aiohttp.ClientSession
    progress: Progress
    api_key: str | None
    handover: Handover

    def build_app(self, max_body_bytes: int = MAX_BODY_BYTES) -> web.Application:
        """Return the application."""
        app = web.Application(
            client_max_size=max_body_bytes, middlewares=[_openai_errors, self._check_key]
        )
        for path in (CHAT, COMPLETIONS, RESPONSES):
            app.router.add_post(path, self._serve)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/nodes", self._nodes)
        app.router.add_get(CONTROL_PATH, self.hub.handle)
        return app

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in _OPEN_PATHS:
            check_key(request.headers.get("Authorization"), self.api_key)
        return await handler(request)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        status = 500
        try:
            if self.handover.url:
                response = await self.handover.forward(request)
            else:
                self._check_ready()
                with self.admission.admit():
                    response = await self.router.serve(request)
            status = response.status
        except (ApiError, web.HTTPException) as error:
            status = error.status
            raise
        except (asyncio.CancelledError, ConnectionError):
            status = 499  # the client went away
            raise
        else:
            return response
        finally:
            self.metrics.requests.labels(request.path, str(status)).inc()

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        decodes = self.registry.ready("decode")
        if not decodes:
            raise ApiError(503, "no_decode_engine", self.router.unready_reason(), retry_after_s=2)
        timeout = aiohttp.ClientTimeout(total=_MODELS_TIMEOUT_S)
        try:
            async with self.session.get(decodes[0].url + "/v1/models", timeout=timeout) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise ApiError(
                502, "engine_failure", f"{decodes[0].name}: {type(error).__name__}: {error}"
            ) from error
        return web.Response(status=answer.status, body=body, content_type=answer.content_type)

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "alive"})

    async def _ready(self, _request: web.Request) -> web.StreamResponse:
        reason = self._unready_reason()
        if reason:
            return web.json_response({"ready": False, "reason": reason}, status=503)
        return web.json_response({"ready": True, "pairs": len(self.registry.usable_pairs())})

    def _unready_reason(self) -> str:
        if self.progress.state != "READY":
            stage = f"{self.progress.stage} {self.progress.reason}".strip()
            return f"the run is {self.progress.state}: {stage}"
        return "" if self.registry.ready("decode") else self.router.unready_reason()

    def _check_ready(self) -> None:
        if self.progress.state == "STARTING":
            raise ApiError(503, "starting", self._unready_reason(), retry_after_s=5)

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        engines = [engine for engine in self.registry.engines.values() if engine.ready]
        text = await self.metrics.render(self.session, engines)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _nodes(self, _request: web.Request) -> web.StreamResponse:
        engines = [describe_engine(engine) for engine in self.registry.engines.values()]
        return web.json_response({"state": self.progress.state, "engines": engines})


@web.middleware
async def _openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPRequestEntityTooLarge as error:
        return ApiError(413, "request_too_large", error.text or error.reason).response()
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = f"{request.method} {request.path}: {error.reason}"
        return ApiError(error.status, error.reason.lower().replace(" ", "_"), message).response()
