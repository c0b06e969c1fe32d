# SPDX-License-Identifier: Apache-2.0
"""Models and TP sizes beside the shipped model's: the tokens of one engine again.

Tiny models with random weights: what differs is which KV there is and how it is cut.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from rdma_kv_cache.cluster.launch import Cluster
from rdma_kv_cache.cluster.run_dir import RunDir
from rdma_kv_cache.config import load_job
from tests.e2e.conftest import BLOCK, ENGINE_ARGS, START_TIMEOUT_S
from tests.e2e.observe import wait_nothing_held, wait_ready
from tests.support.client import Client
from tests.support.prompts import prompt
from tests.support.synthetic_model import (
    Shape,
    write_config,
    write_sliding_window_model,
    write_weights,
)
from tests.support.vllm_server import VllmServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MAX_TOKENS = 6
KV_BYTES = 256 << 20
WINDOW = 80
"""Tokens; not a multiple of a block."""
FOUR_HEADS = Shape(256, 512, 4, 8, 4, 64, 4096)
"""The shipped model's three KV heads cannot be dealt out to two ranks."""
# Around pages, chunks, the window, and where the window begins with a page.
LENGTHS = sorted(
    {1, 2, 31, 32, 33, 79, 80, 81, 111, 112, 113, 143, 144, 145, 255, 256, 257, 300, 513, 700}
)


def prompts() -> list[list[int]]:
    return [prompt(n, offset=11 * i) for i, n in enumerate(LENGTHS)]


def texts_of_one_engine(model: Path, log: Path) -> list[str]:
    args = [
        *ENGINE_ARGS, "--dtype", "float32", "--block-size", str(BLOCK),
        "--max-model-len", "1024", "--kv-cache-memory-bytes", str(KV_BYTES),
    ]  # fmt: skip
    with VllmServer(log, core="0-1", model=model, args=args) as server:
        client = Client(server.url, model=model.name)
        return asyncio.run(client.complete_all(prompts(), MAX_TOKENS, concurrency=4))


def job_file(folder: Path, model: Path, prefill_tp: int, decode_tp: int) -> Path:
    def group(core: str, tp_size: int) -> dict[str, Any]:
        return {
            "vllm_args": ENGINE_ARGS,
            "env": {"VLLM_CPU_OMP_THREADS_BIND": "|".join([core] * tp_size)},
            "tensor_parallel_size": tp_size,
        }

    job = {
        "model": {
            "name": str(model), "max_model_len": 1024, "dtype": "float32", "block_size": BLOCK,
        },
        "prefill": group("0", prefill_tp),
        "decode": group("1", decode_tp),
        "rdma": {"kv_buffer": KV_BYTES, "checksum": True, "transfer_timeout_s": 60},
        "orchestrator": {"health_timeout_s": 30},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def sliding(folder: Path) -> Path:
    return write_sliding_window_model(folder, WINDOW)


def full(folder: Path) -> Path:
    write_weights(write_config(folder, FOUR_HEADS, "float32"), FOUR_HEADS)
    return folder


@pytest.mark.parametrize(
    ("model", "prefill_tp", "decode_tp"),
    [(sliding, 1, 1), (full, 1, 2), (full, 2, 1)],
    ids=["sliding-window", "tp-1-to-2", "tp-2-to-1"],
)
def test_every_text_equals_one_engines(
    model: Callable[[Path], Path], prefill_tp: int, decode_tp: int, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    expected = texts_of_one_engine(folder, tmp_path / "reference.log")
    assert len(set(expected)) > len(expected) // 2  # texts depend on their prompts
    job = job_file(tmp_path, folder, prefill_tp, decode_tp)
    with Cluster(job, load_job(job), RunDir(tmp_path / "run")) as cluster:
        cluster.wait_ready(START_TIMEOUT_S)
        client = Client(cluster.url, cluster.api_key, model=folder.name)

        async def play() -> None:
            await wait_ready(client)
            for salt in ("cold", "cold"):  # the second time decode has most pages already
                found = await client.complete_all(
                    prompts(), MAX_TOKENS, concurrency=4, cache_salt=salt
                )
                wrong = [n for n, a, b in zip(LENGTHS, expected, found, strict=True) if a != b]
                assert wrong == []
            metrics = await client.metrics()
            assert metrics["vllm:rdma_kv_bytes_total", "prefill-0"] > 0
            assert metrics["vllm:rdma_kv_checksum_pages_total", "decode-0"] > 0
            assert metrics["vllm:rdma_kv_transfers_failed_total", "decode-0"] == 0
            await wait_nothing_held(client)

        asyncio.run(play())
