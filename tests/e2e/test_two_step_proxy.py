# SPDX-License-Identifier: Apache-2.0
"""A stock two-step proxy: prefill first, its kv_transfer_params passed verbatim to decode."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import MAX_TOKENS
from tests.e2e.observe import nodes, wait_nothing_held, wait_ready
from tests.support.client import Client

if TYPE_CHECKING:
    from rdma_kv_cache.cluster.launch import Cluster
    from tests.e2e.conftest import Reference

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NIXL_PREFILL_PARAMS = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
    "remote_block_ids": None, "remote_host": None, "remote_port": None,
}  # fmt: skip


async def post(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    async with client.session() as session, session.post("/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return dict(await answer.json())


async def engines(client: Client, key: str) -> tuple[Client, Client]:
    """Clients of the two vLLM servers themselves."""
    known = await nodes(client)
    return tuple(  # type: ignore[return-value]
        Client(known[name]["url"], key) for name in ("prefill-0", "decode-0")
    )


def test_params_pass_through_verbatim(
    reference: Reference, cluster: Cluster, client: Client, engine_key: str
) -> None:
    prompt, text = reference.of_length(777)

    async def play() -> None:
        await wait_ready(client)
        prefill, decode = await engines(client, engine_key)
        body = prefill.body(prompt, 1, kv_transfer_params=NIXL_PREFILL_PARAMS)
        params = (await post(prefill, body))["kv_transfer_params"]
        assert params["remote_engine_id"] == "prefill-0"
        body = decode.body(prompt, MAX_TOKENS, kv_transfer_params=params)
        assert (await post(decode, body))["choices"][0]["text"] == text
        # Used once: the same parameters again find nothing, and decode computes by itself.
        assert (await post(decode, body))["choices"][0]["text"] == text
        await wait_nothing_held(client)

    asyncio.run(play())


def test_prefill_blocks_are_released_when_decode_never_asks(
    reference: Reference, cluster: Cluster, client: Client, engine_key: str
) -> None:
    prompt, _ = reference.of_length(333)

    async def play() -> None:
        await wait_ready(client)
        prefill, _ = await engines(client, engine_key)
        await post(prefill, prefill.body(prompt, 1, kv_transfer_params=NIXL_PREFILL_PARAMS))
        held = await client.metrics()
        assert held["vllm:kv_cache_usage_perc", "prefill-0"] > 0
        await wait_nothing_held(client)

    asyncio.run(play())
