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
import platform
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from rdma_kv_cache.cluster.launch import Cluster
from rdma_kv_cache.cluster.run_dir import RunDir
from rdma_kv_cache.config import load_job
from tests.support.client import Client
from tests.support.prompts import corpus
from tests.support.vllm_server import MODEL, VllmServer, free_port

MODEL_NAME = "smollm2-135m"
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


@dataclass
class Samples:
    """What one system showed at one prompt length."""

    ttft_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    bytes_moved: float = 0.0
    busy_s: float = 0.0
    exposed_s: float = 0.0
    descriptors: float = 0.0
    writes: float = 0.0


class OneEngine:
    """A single vLLM engine."""

    name = "one engine"

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ask(self, prompt: list[int], samples: Samples) -> None:
        ttft, gaps = await self._client.first_token(prompt, DECODE_TOKENS)
        samples.ttft_s.append(ttft)
        samples.step_s += gaps


class Ours:
    """The orchestrator, with one prefill and one decode engine behind it."""

    name = "rdma-kv-cache"
    FIGURES = ("bytes", "busy_seconds", "exposed_seconds", "descriptors", "writes")

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ask(self, prompt: list[int], samples: Samples) -> None:
        before = await self._figures()
        ttft, gaps = await self._client.first_token(prompt, DECODE_TOKENS)
        samples.ttft_s.append(ttft)
        samples.step_s += gaps
        # The engine's counters reach /metrics with its next steps.
        for _ in range(40):
            moved = [b - a for a, b in zip(before, await self._figures(), strict=True)]
            if moved[1] > 0:
                break
            await asyncio.sleep(0.1)
        samples.bytes_moved += moved[0]
        samples.busy_s += moved[1]
        samples.exposed_s += moved[2]
        samples.descriptors += moved[3]
        samples.writes += moved[4]

    async def _figures(self) -> list[float]:
        values = await self._client.metrics()
        return [values.get((f"vllm:rdma_kv_{n}_total", "prefill-0"), 0.0) for n in self.FIGURES]


class Nixl:
    """NixlConnector behind the two-step protocol."""

    name = "NixlConnector"
    PREFILL: ClassVar = {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
        "remote_block_ids": None, "remote_host": None, "remote_port": None,
    }  # fmt: skip

    def __init__(self, servers: list[VllmServer]) -> None:
        self._servers = servers
        self._prefill, self._decode = (Client(server.url) for server in servers)

    def signal(self, sig: signal.Signals) -> None:
        """Stop or continue both engines."""
        for server in self._servers:
            server.signal(sig)

    async def ask(self, prompt: list[int], samples: Samples) -> None:
        self.signal(signal.SIGCONT)
        try:
            await self._ask(prompt, samples)
        finally:
            self.signal(signal.SIGSTOP)

    async def _ask(self, prompt: list[int], samples: Samples) -> None:
        before = await self._figures()
        began = time.monotonic()
        async with (
            self._prefill.session() as session,
            session.post(
                "/v1/completions",
                json=self._prefill.body(prompt, 1, kv_transfer_params=self.PREFILL),
            ) as answer,
        ):
            answer.raise_for_status()
            params = (await answer.json())["kv_transfer_params"]
        gone = time.monotonic() - began
        ttft, gaps = await self._decode.first_token(
            prompt, DECODE_TOKENS, kv_transfer_params=params
        )
        samples.ttft_s.append(gone + ttft)
        samples.step_s += gaps
        after = await self._figures()
        samples.bytes_moved += after[0] - before[0]
        samples.busy_s += after[1] - before[1]
        samples.descriptors += after[2] - before[2]

    async def _figures(self) -> list[float]:
        values = await self._decode.metrics()
        names = ("bytes_transferred", "xfer_time_seconds", "num_descriptors")
        return [
            sum(v for (n, _), v in values.items() if n == f"vllm:nixl_{name}_sum") for name in names
        ]


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
    version("nixl")
    servers = []
    for role, core in (("kv_producer", "0"), ("kv_consumer", "1")):
        transfer = {
            "kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu",
            "engine_id": f"nixl-{role}",
        }  # fmt: skip
        env = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        }
        server = VllmServer(
            folder / f"nixl-{role}.log", core=core, args=VLLM_ARGS, kv_transfer=transfer, env=env
        )
        stack.callback(server.stop)
        server.start()
        servers.append(server)
    for server in servers:
        server.wait_ready()
    nixl = Nixl(servers)
    nixl.signal(signal.SIGSTOP)
    return nixl


async def measure(
    systems: list[Any], lengths: list[int], repeats: int
) -> dict[tuple[str, int], Samples]:
    """Ask every system in turn; the first round warms up and does not count."""
    results = {(s.name, n): Samples() for s in systems for n in lengths}
    offset = 0
    for round_number in range(repeats + 1):
        for tokens in lengths:
            for system in systems:
                offset = (offset + 37) % 4000
                prompt = corpus()[offset : offset + tokens]
                samples = results[system.name, tokens] if round_number else Samples()
                await system.ask(prompt, samples)
    return results


def report(results: dict[tuple[str, int], Samples], lengths: list[int], names: list[str]) -> None:
    """Print the table and the RESULT line."""
    table = Table(title="Time to first token, ms: median (min to max)")
    headings = ("prompt", "system", "TTFT", "÷ one engine", "GB/s", "descriptors", "hidden")
    for heading in headings:
        table.add_column(heading, justify="right")
    figures: dict[str, Any] = {}
    for tokens in lengths:
        alone = results["one engine", tokens]
        step = statistics.median(alone.step_s)
        for name in names:
            s = results[name, tokens]
            median, count = statistics.median(s.ttft_s), len(s.ttft_s)
            rate = s.bytes_moved / s.busy_s / 1e9 if s.busy_s else None
            hidden = 1 - s.exposed_s / s.busy_s if s.busy_s and s.writes else None
            ratio = median / statistics.median(alone.ttft_s)
            merged = f"{s.descriptors / count:.0f}" + (
                f" → {s.writes / count:.0f}" if s.writes else ""
            )
            table.add_row(
                str(tokens), name,
                f"{median * 1e3:.0f} ({min(s.ttft_s) * 1e3:.0f} to {max(s.ttft_s) * 1e3:.0f})",
                f"{ratio:.2f}", f"{rate:.2f}" if rate else "–",
                merged if s.descriptors else "–", f"{hidden:.0%}" if hidden is not None else "–",
            )  # fmt: skip
            key = f"{name.replace(' ', '_').replace('-', '_').lower()}_{tokens}"
            figures[f"{key}_ttft_ms"] = round(median * 1e3, 2)
            figures[f"{key}_ttft_min_ms"] = round(min(s.ttft_s) * 1e3, 2)
            figures[f"{key}_ttft_max_ms"] = round(max(s.ttft_s) * 1e3, 2)
            if rate:
                figures[f"{key}_transfer_gb_per_s"] = round(rate, 3)
                figures[f"{key}_descriptors_per_request"] = round(s.descriptors / count, 1)
            if hidden is not None:
                figures[f"{key}_writes_per_request"] = round(s.writes / count, 1)
                figures[f"{key}_hidden_share"] = round(hidden, 4)
        limit = 1.10 * statistics.median(alone.ttft_s) + step
        figures[f"bar_{tokens}_ttft_ms"] = round(limit * 1e3, 2)
        figures[f"one_engine_{tokens}_decode_step_ms"] = round(step * 1e3, 2)
        table.add_section()
    Console(width=120).print(table)
    print("RESULT " + json.dumps({**figures, **versions()}))


def versions() -> dict[str, Any]:
    """What was compared, and on what."""
    names = ("rdma-kv-cache", "vllm-cpu", "nixl", "torch")
    found = {}
    for name in names:
        try:
            found[f"{name}_version"] = version(name)
        except PackageNotFoundError:
            found[f"{name}_version"] = "absent"
    return {**found, "machine": platform.processor() or platform.machine()}


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
        systems: list[Any] = [OneEngine(Client(one.url, model=MODEL_NAME))]
        try:
            systems.append(start_nixl(folder, stack))
        except (PackageNotFoundError, RuntimeError) as error:
            print(f"NixlConnector is left out: {error}", file=sys.stderr)
        path = job_file(folder)
        cluster = stack.enter_context(Cluster(path, load_job(path), RunDir(folder / "run")))
        cluster.wait_ready(300, on_stage=lambda stage: print(stage, file=sys.stderr))
        systems.append(Ours(Client(cluster.url, cluster.api_key)))
        results = asyncio.run(measure(systems, lengths, options.repeats))
    report(results, lengths, [s.name for s in systems])


if __name__ == "__main__":
    main()
