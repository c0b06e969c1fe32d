# SPDX-License-Identifier: Apache-2.0
"""Prefill/decode gives the tokens of one engine, for every boundary that a transfer knows."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import MAX_TOKENS
from tests.e2e.observe import wait_nothing_held, wait_ready

if TYPE_CHECKING:
    from tests.e2e.conftest import Reference
    from tests.support.client import Client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def differing(reference: Reference, texts: list[str]) -> list[int]:
    """Lengths of the prompts whose text differs."""
    return [
        len(p)
        for p, expected, text in zip(reference.prompts, reference.texts, texts, strict=True)
        if expected != text
    ]


def test_every_text_equals_one_engines(reference: Reference, client: Client) -> None:
    assert len(reference.prompts) >= 64

    async def ask_all() -> list[str]:
        return await client.complete_all(
            reference.prompts, MAX_TOKENS, concurrency=8, cache_salt="exact"
        )

    async def play() -> None:
        await wait_ready(client)
        before = await client.metrics()
        cold = await ask_all()
        assert differing(reference, cold) == []
        after_cold = await client.metrics()
        # Now decode has most pages in its prefix cache and asks for the rest only.
        warm = await ask_all()
        assert differing(reference, warm) == []
        after_warm = await client.metrics()
        moved, moved_warm, verified, failed = (
            (end.get(key, 0.0) - begin.get(key, 0.0))
            for begin, end, key in (
                (before, after_cold, ("vllm:rdma_kv_bytes_total", "prefill-0")),
                (after_cold, after_warm, ("vllm:rdma_kv_bytes_total", "prefill-0")),
                (before, after_warm, ("vllm:rdma_kv_checksum_pages_total", "decode-0")),
                (before, after_warm, ("vllm:rdma_kv_transfers_failed_total", "decode-0")),
            )
        )
        layers_and_bytes_per_token = 30 * 3 * 64 * 2 * 4
        assert moved > 0.9 * layers_and_bytes_per_token * sum(map(len, reference.prompts))
        assert moved_warm < 0.2 * moved
        assert verified > 0
        assert failed == 0
        await wait_nothing_held(client)

    asyncio.run(play())


def test_streams_carry_the_same_text(reference: Reference, client: Client) -> None:
    prompt, text = reference.of_length(333)

    async def play() -> None:
        await wait_ready(client)
        chunks = await client.stream(client.body(prompt, MAX_TOKENS))
        assert "".join(part for _, part in chunks) == text
        assert len(chunks) > 1

    asyncio.run(play())
