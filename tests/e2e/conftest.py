# SPDX-License-Identifier: Apache-2.0
"""One reference engine, then one real cluster (1 prefill, 1 decode) for all end-to-end tests.

float32: with bfloat16 one engine alone gives other tokens when requests are batched differently
(12 of 58 prompts differed), so only float32 can tell a wrong page from rounding.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest
import yaml

from rdma_kv_cache.cluster.launch import Cluster
from rdma_kv_cache.cluster.run_dir import RunDir
from rdma_kv_cache.config import load_job
from tests.support.client import Client
from tests.support.prompts import boundary_lengths, prompt
from tests.support.vllm_server import MODEL, VllmServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK, CHUNK, LONGEST = 32, 256, 1600
MAX_TOKENS = 8
START_TIMEOUT_S = 300.0
ENGINE_ARGS = [
    "--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", str(CHUNK),
]  # fmt: skip
KV_BYTES = 2 << 30
"""46,080 bytes a token in float32: room for all prompts, so that the second pass finds them cached."""


@dataclass(frozen=True)
class Reference:
    """Prompts and the texts that one engine gives for them."""

    prompts: list[list[int]]
    texts: list[str]

    def of_length(self, tokens: int) -> tuple[list[int], str]:
        """The prompt with this many tokens, and its text."""
        index = [len(p) for p in self.prompts].index(tokens)
        return self.prompts[index], self.texts[index]


def reference_prompts() -> list[list[int]]:
    """At least 64 prompts of distinct lengths, no two of which share a block."""
    lengths = boundary_lengths(BLOCK, CHUNK, LONGEST)
    return [prompt(n, offset=11 * i) for i, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    log = tmp_path_factory.mktemp("reference") / "vllm.log"
    args = [
        *ENGINE_ARGS, "--dtype", "float32", "--block-size", str(BLOCK),
        "--max-model-len", "2048", "--kv-cache-memory-bytes", str(KV_BYTES),
    ]  # fmt: skip
    prompts = reference_prompts()
    with VllmServer(log, core="0-1", args=args) as server:
        texts = asyncio.run(Client(server.url).complete_all(prompts, MAX_TOKENS, concurrency=4))
    return Reference(prompts, texts)


def write_job(folder: Path, **rdma: object) -> Path:
    """A job file for this machine: checksum mode on, short deadlines."""
    job = {
        "model": {
            "name": str(MODEL), "max_model_len": 2048, "dtype": "float32", "block_size": BLOCK,
        },
        "prefill": {
            "engines": 1, "vllm_args": ENGINE_ARGS, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0"},
        },
        "decode": {
            "engines": 1, "vllm_args": ENGINE_ARGS, "env": {"VLLM_CPU_OMP_THREADS_BIND": "1"},
        },
        "rdma": {
            "kv_buffer": KV_BYTES, "checksum": True, "transfer_timeout_s": 300, "lease_s": 10,
            "peer_timeout_s": 5, "cancel_timeout_s": 5, **rdma,
        },
        "orchestrator": {"health_timeout_s": 10, "max_restarts": 10},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.fixture(scope="session")
def cluster(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    job_file = write_job(folder)
    with Cluster(job_file, load_job(job_file), RunDir(folder / "run")) as running:
        running.wait_ready(START_TIMEOUT_S, on_stage=lambda stage: print(stage, file=sys.stderr))
        yield running


@pytest.fixture
def engine_key(cluster: Cluster) -> str:
    """The key of the vLLM servers, as only a process of the same user can read it."""
    nodes = asyncio.run(Client(cluster.url, cluster.api_key).get_json("/nodes"))
    environment = psutil.Process(nodes["engines"][0]["pid"]).environ()
    return environment["VLLM_API_KEY"]


@pytest.fixture
def client(cluster: Cluster) -> Client:
    return Client(cluster.url, cluster.api_key)
