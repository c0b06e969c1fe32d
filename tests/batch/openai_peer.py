# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server for the batch client to talk to; it runs in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Self

    Answer = Callable[[dict[str, Any], int], Awaitable[web.StreamResponse]]

MODEL = "small-model"


def answer_body(body: dict[str, Any]) -> dict[str, Any]:
    """What vLLM answers to a completion: the text says which prompt it was."""
    return {
        "id": "cmpl-1",
        "model": body.get("model", MODEL),
        "choices": [{"index": 0, "text": f"answer to {body['prompt']}"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 4},
        "metrics": {
            "queue_time_ms": 5.0,
            "time_to_first_token_ms": 20.0,
            "mean_itl_ms": 7.5,
        },
    }


async def answer_well(body: dict[str, Any], _attempt: int) -> web.StreamResponse:
    """Answer as a healthy server does."""
    return web.json_response(answer_body(body), headers={"X-Request-Id": f"id-{body['prompt']}"})


class OpenAIPeer:
    """Use as a context manager. `answer(body, attempt)` may be replaced by a test."""

    def __init__(self, answer: Answer = answer_well) -> None:
        self.answer = answer
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: set[str | None] = set()
        self.metrics_text = ""
        self.in_flight = 0
        self.most_in_flight = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        runner = self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self.authorizations.add(request.headers.get("Authorization"))
        return web.json_response({"data": [{"id": MODEL}]})

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        if not self.metrics_text:
            raise web.HTTPNotFound
        return web.Response(text=self.metrics_text)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        body.setdefault("prompt", str(body.get("messages")))
        self.bodies.append(body)
        self.authorizations.add(request.headers.get("Authorization"))
        self.asked[body["prompt"]] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.answer(body, self.asked[body["prompt"]])
        finally:
            self.in_flight -= 1
