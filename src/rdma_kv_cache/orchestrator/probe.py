# SPDX-License-Identifier: Apache-2.0
"""A small completion served by the engines themselves: the only proof that they serve."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import aiohttp
import msgspec

from rdma_kv_cache.orchestrator.bodies import COMPLETIONS
from rdma_kv_cache.orchestrator.dispatch import attempt
from rdma_kv_cache.orchestrator.legs import LegError

if TYPE_CHECKING:
    from rdma_kv_cache.orchestrator.engines import Engine

MODELS_TIMEOUT_S = 5.0


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: Annotated[list[_Model], msgspec.Meta(min_length=1)]


class ProbeError(Exception):
    """A probe that was not served, with the engines and the reason."""


async def serve_probe(
    session: aiohttp.ClientSession, prefill: Engine | None, decode: Engine, timeout_s: float
) -> None:
    """Have a two-token completion served by the pair (`prefill` None: by `decode` alone).

    The prompt is new each time, so that a prefix cache does not answer instead of a transfer.
    Raises ProbeError.
    """
    who = f"{prefill.name} and {decode.name}" if prefill else decode.name
    try:
        body: dict[str, Any] = {
            "model": await _served_model(session, decode),
            "prompt": f"{uuid.uuid4().hex}: is this engine serving?",
            "max_tokens": 2,
            "temperature": 0,
        }
        async with attempt(session, COMPLETIONS, body, prefill, decode, timeout_s) as running:
            answer = running.answer
    except (LegError, aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        raise ProbeError(f"{who} did not serve a probe: {type(error).__name__}: {error}") from error
    if answer.status != 200:
        text = answer.body[:300].decode("utf-8", "replace")
        raise ProbeError(f"{who} did not serve a probe: HTTP {answer.status}: {text}")


async def _served_model(session: aiohttp.ClientSession, engine: Engine) -> str:
    timeout = aiohttp.ClientTimeout(total=MODELS_TIMEOUT_S)
    async with session.get(engine.url + "/v1/models", timeout=timeout) as response:
        response.raise_for_status()
        models = msgspec.json.decode(await response.read(), type=_Models)
    return models.data[0].id
