# SPDX-License-Identifier: Apache-2.0
"""Faults with real processes: every answer right, no block held, the next request served."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.e2e.conftest import MAX_TOKENS
from tests.e2e.observe import (
    engine_processes,
    nodes,
    until,
    wait_nothing_held,
    wait_ready,
    wait_restarted,
)

if TYPE_CHECKING:
    from tests.e2e.conftest import Reference
    from tests.support.client import Client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LONG = 1600
SEND_LIMIT_S = 30.0
ANSWER_LIMIT_S = 90.0
"""A long prompt computed twice on one core, plus the time to notice (peer_timeout_s)."""


async def hit(client: Client, engine: str, sig: signal.Signals) -> None:
    """Send a signal to every process of this engine's vLLM."""
    for process in engine_processes((await nodes(client))[engine]["pid"]):
        process.send_signal(sig)


async def sent_bytes(client: Client) -> float:
    """KV bytes that the prefill engine has written so far."""
    return (await client.metrics()).get(("vllm:rdma_kv_bytes_total", "prefill-0"), 0.0)


async def prefill_sends(client: Client, before: float) -> None:
    """Wait until KV of the running prefill is on its way; a chunk of seven or so is."""

    async def more_sent() -> bool:
        return await sent_bytes(client) > before

    await until(more_sent, SEND_LIMIT_S, "prefill sends")


@pytest.mark.parametrize("engine", ["prefill-0", "decode-0"])
def test_kill_in_mid_transfer(reference: Reference, client: Client, engine: str) -> None:
    prompt, text = reference.of_length(LONG)

    async def play() -> None:
        await wait_ready(client)
        before, sent = (await nodes(client))[engine], await sent_bytes(client)
        answer = asyncio.create_task(
            client.complete(prompt, MAX_TOKENS, cache_salt=f"kill-{engine}")
        )
        await prefill_sends(client, sent)
        assert not answer.done()
        began = time.monotonic()
        await hit(client, engine, signal.SIGKILL)
        if engine == "prefill-0":
            # Decode loses its peer, recomputes and answers; the client notices nothing.
            assert await asyncio.wait_for(answer, ANSWER_LIMIT_S) == text
        else:
            # The only decode engine is gone: a clear error now, or the answer after its restart.
            outcome = (await asyncio.gather(answer, return_exceptions=True))[0]
            assert outcome == text or "HTTP 50" in str(outcome)
        print(f"{engine} killed: answered after {time.monotonic() - began:.1f} s")
        print(f"{engine} READY again after {await wait_restarted(client, engine, before):.1f} s")
        await wait_nothing_held(client)
        short, short_text = reference.of_length(333)
        assert await client.complete(short, MAX_TOKENS, cache_salt=f"next-{engine}") == short_text
        await wait_nothing_held(client)

    asyncio.run(play())


def test_prefill_hangs(reference: Reference, client: Client) -> None:
    prompt, text = reference.of_length(LONG)

    async def play() -> None:
        await wait_ready(client)
        before, sent = (await nodes(client))["prefill-0"], await sent_bytes(client)
        answer = asyncio.create_task(client.complete(prompt, MAX_TOKENS, cache_salt="hang"))
        await prefill_sends(client, sent)
        assert not answer.done()
        began = time.monotonic()
        await hit(client, "prefill-0", signal.SIGSTOP)
        assert await asyncio.wait_for(answer, ANSWER_LIMIT_S) == text
        print(f"prefill hung: answered after {time.monotonic() - began:.1f} s")
        seconds = await wait_restarted(client, "prefill-0", before)
        print(f"prefill READY again after {seconds:.1f} s")
        await wait_nothing_held(client)

    asyncio.run(play())


@pytest.mark.parametrize(("phase", "after_s"), [("prefill", 1.0), ("decode", 0.0)])
def test_client_disconnects(
    reference: Reference, client: Client, phase: str, after_s: float
) -> None:
    prompt, _ = reference.of_length(LONG if phase == "prefill" else 100)
    body = client.body(
        prompt, 1 if phase == "prefill" else 300, stream=True, cache_salt=f"gone-{phase}"
    )

    async def play() -> None:
        await wait_ready(client)
        async with client.session() as session:
            if phase == "prefill":
                with pytest.raises((asyncio.TimeoutError, TimeoutError)):
                    await asyncio.wait_for(session.post("/v1/completions", json=body), after_s)
            else:
                answer = await session.post("/v1/completions", json=body)
                assert isinstance(answer, aiohttp.ClientResponse)
                await answer.content.readline()
                answer.close()
        began = time.monotonic()
        await wait_nothing_held(client)
        print(f"disconnect in {phase}: nothing held after {time.monotonic() - began:.1f} s")
        short, text = reference.of_length(333)
        assert await client.complete(short, MAX_TOKENS, cache_salt=f"after-{phase}") == text

    asyncio.run(play())
