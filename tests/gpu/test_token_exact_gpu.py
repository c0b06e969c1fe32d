# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode on GPUs give the tokens of one engine, for every boundary of a transfer.

float32, as in the end-to-end tests on the CPU: only then a wrong page can be told from rounding.
Weights are random but not small, so that a page matters: with one page of one layer zeroed, 11 of
24 answers changed. `RKV_GPU_ON_CPU=1` runs all of it on vLLM's CPU build.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from rdma_kv_cache.cluster.launch import Cluster
from rdma_kv_cache.cluster.run_dir import RunDir
from rdma_kv_cache.config import load_job
from tests.e2e.conftest import Reference
from tests.e2e.observe import (
    engine_processes,
    nodes,
    until,
    wait_nothing_held,
    wait_ready,
    wait_restarted,
)
from tests.e2e.test_token_exact import differing
from tests.support.client import Client
from tests.support.prompts import boundary_lengths, prompt
from tests.support.synthetic_model import SMALL, write_config, write_weights
from tests.support.vllm_server import VllmServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ON_CPU = bool(os.environ.get("RKV_GPU_ON_CPU"))
BLOCK, CHUNK, LONGEST, ROUNDS = (32, 128, 500, 1) if ON_CPU else (16, 512, 2000, 3)
MAX_TOKENS, CONCURRENCY = 8, 8
KV_BYTES = 2 << 30
START_TIMEOUT_S = 300.0
SEND_LIMIT_S = 60.0
# Triton multiplies float32 with 10 bits of mantissa if it is not told otherwise.
ENV = {
    "CUDA_VISIBLE_DEVICES": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "TRITON_F32_DEFAULT": "ieee",
}  # fmt: skip
ENGINE_ARGS = [
    "--enforce-eager", "--max-num-seqs", str(CONCURRENCY), "--max-num-batched-tokens", str(CHUNK),
    *([] if ON_CPU else ["--attention-backend", "TRITON_ATTN"]),
]  # fmt: skip


def env(core: str) -> dict[str, str]:
    """Variables of one engine's vLLM."""
    return {"VLLM_CPU_OMP_THREADS_BIND": core} if ON_CPU else ENV


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with weights (0.3 GB)."""
    folder = write_config(tmp_path_factory.mktemp("model") / "small", SMALL, "float32")
    write_weights(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One engine's texts; prompts whose text it changes with the batch are left out."""
    args = [
        *ENGINE_ARGS, "--dtype", "float32", "--block-size", str(BLOCK), "--max-model-len", "4096",
        "--kv-cache-memory-bytes", str(KV_BYTES), "--gpu-memory-utilization", "0.2",
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    boundaries = {n for n in boundary_lengths(BLOCK, CHUNK, LONGEST) if n <= LONGEST}
    lengths = sorted({*boundaries, *range(60, LONGEST, LONGEST // 21)})
    prompts = [prompt(n, offset=11 * i) for i, n in enumerate(lengths)]
    log = tmp_path_factory.mktemp("reference") / "vllm.log"
    with VllmServer(log, args=args, model=model, env=env("0-1")) as server:
        client = Client(server.url, model=model.name)

        async def ask() -> tuple[list[str], list[str]]:
            return (
                await client.complete_all(prompts, MAX_TOKENS, concurrency=CONCURRENCY),
                await client.complete_all(prompts, MAX_TOKENS, concurrency=1),
            )

        together, alone = asyncio.run(ask())
    agreed = [i for i, text in enumerate(alone) if text == together[i]]
    print(f"one engine agrees with itself on {len(agreed)} of {len(prompts)} prompts")
    return Reference([prompts[i] for i in agreed], [alone[i] for i in agreed])


@pytest.fixture(scope="module")
def client(
    request: pytest.FixtureRequest,
    model: Path,
    reference: Reference,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Client]:
    """A cluster of one prefill and one decode engine; the parameter is `rdma.checksum`."""
    folder = tmp_path_factory.mktemp("cluster")
    job = {
        "model": {
            "name": str(model), "max_model_len": 4096, "dtype": "float32", "block_size": BLOCK,
            "gpu_memory_utilization": 0.2,
        },
        "prefill": {"vllm_args": ENGINE_ARGS, "env": env("0")},
        "decode": {"vllm_args": ENGINE_ARGS, "env": env("1")},
        "rdma": {
            "kv_buffer": KV_BYTES, "checksum": request.param, "backend": "tcp" if ON_CPU else "cuda_ipc",
            "lease_s": 10,
        },
        "orchestrator": {"max_restarts": 10},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    with Cluster(path, load_job(path), RunDir(folder / "run")) as running:
        running.wait_ready(START_TIMEOUT_S, on_stage=lambda stage: print(stage, file=sys.stderr))
        yield Client(running.url, running.api_key, model.name)


# With checksums every page is verified, but prefill waits for the GPU before it posts a layer; without
# them nothing but the marks keeps a page from leaving too early.
@pytest.mark.parametrize("client", [True, False], ids=["checksum", "plain"], indirect=True)
def test_every_text_equals_one_engines(
    reference: Reference, client: Client, request: pytest.FixtureRequest
) -> None:
    assert len(reference.prompts) >= 64

    async def play() -> None:
        await wait_ready(client)
        before = await client.metrics()
        for number in range(ROUNDS):
            # A salt for each round: every round moves all pages again.
            texts = await client.complete_all(
                reference.prompts, MAX_TOKENS, CONCURRENCY, cache_salt=f"round-{number}"
            )
            assert differing(reference, texts) == []
        after = await client.metrics()

        def gained(name: str, engine: str) -> float:
            key = (f"vllm:rdma_kv_{name}_total", engine)
            return after.get(key, 0.0) - before.get(key, 0.0)

        tokens = ROUNDS * sum(map(len, reference.prompts))
        assert gained("bytes", "prefill-0") > 0.9 * tokens * SMALL.kv_bytes_per_token(4)
        has_checksums = request.node.callspec.params["client"]
        assert (gained("checksum_pages", "decode-0") > 0) == has_checksums
        assert gained("transfers_failed", "decode-0") == 0
        await wait_nothing_held(client)

    asyncio.run(play())


@pytest.mark.parametrize("client", [False], ids=["plain"], indirect=True)
def test_prefill_is_killed_in_mid_round(reference: Reference, client: Client) -> None:
    async def sent() -> float:
        return (await client.metrics()).get(("vllm:rdma_kv_bytes_total", "prefill-0"), 0.0)

    async def play() -> None:
        await wait_ready(client)
        before, bytes_before = (await nodes(client))["prefill-0"], await sent()
        # Longest first, so that several long prompts are on their way when it dies.
        order = sorted(range(len(reference.prompts)), key=lambda i: -len(reference.prompts[i]))
        prompts = [reference.prompts[i] for i in order]
        round_ = asyncio.create_task(
            client.complete_all(prompts, MAX_TOKENS, CONCURRENCY, cache_salt="killed")
        )

        async def is_sending() -> bool:
            return await sent() > bytes_before

        await until(is_sending, SEND_LIMIT_S, "prefill sends")
        for process in engine_processes(before["pid"]):
            process.send_signal(signal.SIGKILL)
        assert not round_.done()
        texts = await round_
        assert differing(Reference(prompts, [reference.texts[i] for i in order]), texts) == []
        print(
            f"prefill READY again after {await wait_restarted(client, 'prefill-0', before):.1f} s"
        )
        await wait_nothing_held(client)
        again = await client.complete_all(
            reference.prompts, MAX_TOKENS, CONCURRENCY, cache_salt="healed"
        )
        assert differing(reference, again) == []

    asyncio.run(play())
