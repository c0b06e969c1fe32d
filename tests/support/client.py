# SPDX-License-Identifier: Apache-2.0
"""A small asynchronous client of the OpenAI endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=180)


@dataclass(frozen=True)
class Client:
    """Talks to one base URL; every call opens its own connection."""

    url: str
    api_key: str | None = None
    model: str = "smollm2-135m"

    def session(self) -> aiohttp.ClientSession:
        """A session with the key."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return aiohttp.ClientSession(self.url, headers=headers, timeout=REQUEST_TIMEOUT)

    def body(self, prompt: list[int] | str, max_tokens: int, **extra: Any) -> dict[str, Any]:
        """A greedy completion request."""
        return {
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens,
            "temperature": 0, "ignore_eos": True, **extra,
        }  # fmt: skip

    async def complete(self, prompt: list[int] | str, max_tokens: int, **extra: Any) -> str:
        """The completed text. Raises RuntimeError with status and body."""
        async with (
            self.session() as session,
            session.post("/v1/completions", json=self.body(prompt, max_tokens, **extra)) as answer,
        ):
            text = await answer.text()
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {text}")
            return str(json.loads(text)["choices"][0]["text"])

    async def complete_all(
        self, prompts: list[list[int]], max_tokens: int, concurrency: int, **extra: Any
    ) -> list[str]:
        """All prompts, `concurrency` at a time."""
        gate = asyncio.Semaphore(concurrency)

        async def one(prompt: list[int]) -> str:
            async with gate:
                return await self.complete(prompt, max_tokens, **extra)

        return list(await asyncio.gather(*(one(p) for p in prompts)))

    async def stream(self, body: dict[str, Any]) -> list[tuple[float, str]]:
        """Monotonic time and text of every chunk of a streamed completion."""
        chunks: list[tuple[float, str]] = []
        async with (
            self.session() as session,
            session.post("/v1/completions", json={**body, "stream": True}) as answer,
        ):
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {await answer.text()}")
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[len(b"data: ") :])["choices"]
                    chunks += [(time.monotonic(), choice["text"]) for choice in choices]
        if not chunks:
            raise RuntimeError("the stream carried no token")
        return chunks

    async def first_token(
        self, prompt: list[int], max_tokens: int = 4, **extra: Any
    ) -> tuple[float, list[float]]:
        """Seconds from the request to the first token, and the gaps between later ones."""
        began = time.monotonic()
        times = [at for at, _ in await self.stream(self.body(prompt, max_tokens, **extra))]
        return times[0] - began, [b - a for a, b in pairwise(times)]

    async def get_json(self, path: str) -> Any:
        """The JSON document at `path`."""
        async with self.session() as session, session.get(path) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def metrics(self) -> dict[tuple[str, str], float]:
        """Samples of /metrics by (name, engine_name), summed over the other labels."""
        async with self.session() as session, session.get("/metrics") as answer:
            answer.raise_for_status()
            text = await answer.text()
        values: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, sample.labels.get("engine_name", ""))
                values[key] = values.get(key, 0.0) + sample.value
        return values
