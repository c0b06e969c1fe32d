# SPDX-License-Identifier: Apache-2.0
"""Time to first token: one vLLM engine, vLLM's NixlConnector, and ours, side by side.

All engines run at once on the same two cores and are asked one after the other, in turn, so that
drift of the machine hits all alike. NixlConnector's engines are stopped (SIGSTOP) while the others are
asked: the progress threads of idle NIXL agents spin, and would take both cores from them. Prefix caching is off. Prefill runs on core 0, decode on core 1,
the single engine on core 0. NixlConnector is driven by the two-step protocol of its stock proxies.

    python tests/bench/bench_pd.py [--repeats 5] [--lengths 128,512,1024,1600]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from rdma_kv_cache.cluster.launch import Cluster
from rdma_kv_cache.cluster.run_dir import RunDir
from rdma_kv_cache.config import load_job
from tests.bench.pd_systems import (
    Nixl,
    NixlEngine,
    OneEngine,
    Ours,
    Samples,
    figures_of,
    key_of,
    measure,
    print_table,
    start_nixl_servers,
    versions,
)
from tests.support.client import Client
from tests.support.prompts import corpus
from tests.support.vllm_server import MODEL, VllmServer

if TYPE_CHECKING:
    from collections.abc import Callable

KV_BYTES = 256 << 20
BLOCK = 32
ENGINE_ARGS = [
    "--enforce-eager", "--max-num-seqs", "4", "--max-num-batched-tokens", "512",
    "--no-enable-prefix-caching",
]  # fmt: skip
VLLM_ARGS = [
    *ENGINE_ARGS, "--dtype", "bfloat16", "--block-size", str(BLOCK), "--max-model-len", "2048",
    "--kv-cache-memory-bytes", str(KV_BYTES),
]  # fmt: skip
DECODE_TOKENS = 4


def job_file(folder: Path) -> Path:
    """Our job: the same model, cores and engine arguments."""
    job = {
        "model": {
            "name": str(MODEL), "max_model_len": 2048, "dtype": "bfloat16", "block_size": BLOCK,
        },
        "prefill": {"vllm_args": ENGINE_ARGS, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0"}},
        "decode": {"vllm_args": ENGINE_ARGS, "env": {"VLLM_CPU_OMP_THREADS_BIND": "1"}},
        "rdma": {"kv_buffer": KV_BYTES},
        # Five engines on two cores: a slow answer is no hang.
        "orchestrator": {"health_timeout_s": 60},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start_nixl(folder: Path, stack: ExitStack) -> Nixl:
    """Two servers with NixlConnector (UCX, buffers in host memory). Raises if nixl is missing."""
    engines = [NixlEngine(VLLM_ARGS, core=core) for core in "01"]
    servers = start_nixl_servers(folder, stack, MODEL, engines, buffer_device="cpu")
    for server in servers:
        server.wait_ready()
    nixl = Nixl(servers, DECODE_TOKENS, pauses=True, name="NixlConnector", model=MODEL.name)
    nixl.signal(signal.SIGSTOP)
    return nixl


def new_prompts() -> Callable[[int], list[int]]:
    """Prompts cut from a text, each from another place."""
    offset = 0

    def prompt(tokens: int) -> list[int]:
        nonlocal offset
        offset = (offset + 37) % 4000
        return corpus()[offset : offset + tokens]

    return prompt


def report(results: dict[tuple[str, int], Samples], lengths: list[int], names: list[str]) -> None:
    """Print the table and the RESULT line."""
    print_table(results, lengths, names, "Time to first token: median (min to max)")
    figures: dict[str, Any] = {}
    for tokens in lengths:
        for name in names:
            figures |= figures_of(results[name, tokens], key_of(name, tokens))
        alone = results[names[0], tokens]
        step = statistics.median(alone.step_s)
        figures[f"bar_{tokens}_ttft_ms"] = round((1.10 * alone.ttft + step) * 1e3, 2)
        figures[f"one_engine_{tokens}_decode_step_ms"] = round(step * 1e3, 2)
    print("RESULT " + json.dumps({**figures, **versions()}))


def main() -> None:
    """Start everything, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", default="128,512,1024,1600")
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        one = stack.enter_context(VllmServer(folder / "one.log", core="0", args=VLLM_ARGS))
        systems: list[Any] = [OneEngine(Client(one.url), DECODE_TOKENS)]
        try:
            systems.append(start_nixl(folder, stack))
        except (PackageNotFoundError, RuntimeError) as error:
            print(f"NixlConnector is left out: {error}", file=sys.stderr)
        path = job_file(folder)
        cluster = stack.enter_context(Cluster(path, load_job(path), RunDir(folder / "run")))
        cluster.wait_ready(300, on_stage=lambda stage: print(stage, file=sys.stderr))
        systems.append(Ours(Client(cluster.url, cluster.api_key), DECODE_TOKENS))
        results = asyncio.run(measure(systems, lengths, options.repeats, new_prompts()))
    report(results, lengths, [s.name for s in systems])


if __name__ == "__main__":
    main()
