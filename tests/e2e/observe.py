# SPDX-License-Identifier: Apache-2.0
"""What end-to-end tests wait for and look at, always with a limit."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.client import Client

HELD_GAUGES = ("vllm:kv_cache_usage_perc", "vllm:rdma_kv_requests_held")
READY_LIMIT_S = 180.0
FREE_LIMIT_S = 45.0


async def until(check: Callable[[], Awaitable[bool]], limit_s: float, what: str) -> float:
    """Poll `check` until it is true; returns the seconds it took. Raises TimeoutError."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        if await check():
            return time.monotonic() - began
        await asyncio.sleep(0.25)
    raise TimeoutError(f"not within {limit_s:.0f} s: {what}")


async def nodes(client: Client) -> dict[str, dict[str, Any]]:
    """The orchestrator's view of its engines, by name."""
    answer = await client.get_json("/nodes")
    return {engine["name"]: engine for engine in answer["engines"]}


async def all_ready(client: Client) -> bool:
    """True if every engine is READY."""
    return all(engine["state"] == "READY" for engine in (await nodes(client)).values())


async def wait_ready(client: Client) -> float:
    """Wait until every engine is READY again."""
    return await until(lambda: all_ready(client), READY_LIMIT_S, "every engine READY")


async def wait_restarted(client: Client, engine: str, before: dict[str, Any]) -> float:
    """Wait until this engine lives again in a new incarnation and every engine is READY."""

    async def restarted() -> bool:
        known = await nodes(client)
        return known[engine]["incarnation"] != before["incarnation"] and await all_ready(client)

    seconds = await until(restarted, READY_LIMIT_S, f"{engine} restarted and READY")
    assert (await nodes(client))[engine]["restarts"] == before["restarts"] + 1
    return seconds


async def wait_nothing_held(client: Client) -> None:
    """Wait until vLLM's own counters say that no KV block is in use on any engine."""
    last: dict[tuple[str, str], float] = {}

    async def nothing_held() -> bool:
        nonlocal last
        last = {k: v for k, v in (await client.metrics()).items() if k[0] in HELD_GAUGES}
        engines = {engine for _, engine in last}
        assert {"prefill-0", "decode-0"} <= engines, f"engines without metrics: {last}"
        return not any(last.values())

    try:
        await until(nothing_held, FREE_LIMIT_S, "no KV block held")
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {last}") from None


def engine_processes(pid: int) -> list[psutil.Process]:
    """vLLM's API server with this pid, its engine core and its workers."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]
