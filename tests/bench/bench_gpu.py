# SPDX-License-Identifier: Apache-2.0
"""Time to first token on a GPU: one vLLM engine, NIXL connectors, and ours, on the same card.

The model has the shape of Llama 3 8B and dummy weights; prefix caching is off, and a batch holds
the longest prompt, so that no prefill is cut in chunks. One card holds one engine and one pair, so
the pairs live one after another, and the one engine lives through all of it: each pair is asked in
turn with the one engine, and compared with what that showed beside it. One card also means that
prefill and decode share its compute and memory bandwidth.

    python3 tests/bench/bench_gpu.py --systems ours,nixl-best --output results.json
    python3 tests/bench/bench_gpu.py --link 25GB/s --lengths 8192,32000
    python3 tests/bench/bench_gpu.py --saturation
    python3 tests/bench/bench_gpu.py --device cpu --lengths 128,512   # the same on a small machine
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from rdma_kv_cache.cluster.launch import Cluster, ClusterError
from rdma_kv_cache.cluster.run_dir import RunDir
from rdma_kv_cache.config import load_job
from tests.bench import bench_gpu_load
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
    word_of,
)
from tests.support.client import Client
from tests.support.synthetic_model import LLAMA_8B, SMALL, Shape, write_config
from tests.support.vllm_server import VllmServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.pd_systems import System

DECODE_TOKENS = 8
START_TIMEOUT_S = 300.0
UCX = {"UCX_TLS": "cuda_ipc,cuda_copy,sm,self,tcp", "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on"}
"""What makes UCX read GPU memory of the same host by CUDA IPC: by default it does so only where it
sees NVLinks, and otherwise moves the bytes over TCP without a word (vLLM issue 52607)."""
NIXL = {
    "nixl": ("NixlConnector", {}),
    "nixl-best": ("NixlConnector", UCX),
    "nixl-push": ("NixlPushConnector", UCX),
}


@dataclass(frozen=True)
class Setup:
    """How all engines of one run are started, the model apart."""

    device: str
    shape: Shape
    max_model_len: int
    block: int
    kv_bytes: int
    batch: int
    decode_batch: int
    sequences: int
    eager: bool

    @property
    def engine_args(self) -> list[str]:
        """Of every engine; the size of a batch comes on top."""
        args = ["--load-format", "dummy", "--no-enable-prefix-caching"]
        args += ["--max-num-seqs", str(self.sequences)]
        if self.eager:
            return [*args, "--enforce-eager"]
        sizes = [n for n in (1, 2, 4, 8, 16) if n <= self.sequences]
        return [*args, "--compilation-config", json.dumps({"cudagraph_capture_sizes": sizes})]

    def batch_args(self, role: str) -> list[str]:
        """A decode engine sees one token of a request at a time."""
        batch = self.decode_batch if role == "decode" else self.batch
        return ["--max-num-batched-tokens", str(batch)]

    @property
    def server_args(self) -> list[str]:
        """Of a server that we start ourselves: what our engine rank says by itself."""
        args = ["--dtype", "bfloat16", "--block-size", str(self.block)]
        args += ["--max-model-len", str(self.max_model_len)]
        args += ["--kv-cache-memory-bytes", str(self.kv_bytes)]
        if self.device == "cuda":
            args += ["--gpu-memory-utilization", str(GPU_SHARE)]
        return [*self.engine_args, *args]

    def env(self, role: str) -> dict[str, str]:
        """Variables of an engine's vLLM."""
        if self.device == "cuda":
            return {"CUDA_VISIBLE_DEVICES": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        return {"VLLM_CPU_OMP_THREADS_BIND": "1" if role == "decode" else "0"}


GPU_SHARE = 0.28
"""vLLM checks at its start that this share is free, whatever the size of its KV cache."""


def setup_for(options: argparse.Namespace) -> Setup:
    """The figures that the memory sum in `Bench` stands on."""
    eager = options.mode == "eager"
    if options.device == "cpu":
        return Setup("cpu", SMALL, 2048, 32, 256 << 20, 2048, 512, 8, eager)
    if options.saturation:
        # Batches as they are used, and room for prompts that wait for their transfer.
        return Setup("cuda", LLAMA_8B, 8192, 16, 8 << 30, 8192, 2048, 16, eager)
    return Setup("cuda", LLAMA_8B, 33000, 16, 9 << 29, 33000, 2048, 8, eager)


class Bench:
    """Starts what is compared. Memory of an 80 GB card, in GB: weights 14.8 each, KV 4.8 each,
    activations of a 33,000 token batch 3.5 (one engine, prefill), 0.6 for each CUDA context: 68.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self.setup = setup_for(options)
        self._options = options
        self._folder = folder
        self._began = time.monotonic()
        self._seeds = random.Random(options.seed)
        self.figures: dict[str, Any] = {}
        self.model = write_config(folder / "model", self.setup.shape, "bfloat16")
        self.one = VllmServer(
            folder / "one.log",
            args=[*self.setup.server_args, *self.setup.batch_args("one")],
            model=self.model, env=self.setup.env("one"),
        )  # fmt: skip
        stack.callback(self.one.stop)

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)

    def prompt(self, tokens: int) -> list[int]:
        """Random token ids, new ones each time; none is a special token."""
        return [self._seeds.randrange(1000, self.setup.shape.vocab_size) for _ in range(tokens)]

    def save(self, more: dict[str, Any] | None = None) -> None:
        """Write all figures that there are to --output."""
        if self._options.output is not None:
            known = {**self.figures, **(more or {}), **self.about()}
            self._options.output.write_text(json.dumps(known, indent=1) + "\n")

    def about(self) -> dict[str, Any]:
        """What was compared, and on what."""
        s = self.setup
        shape = f"{s.shape.num_hidden_layers}x{s.shape.hidden_size}"
        return {
            **versions(), **card(), "mode": self._options.mode, "model": f"Llama {shape}, dummy",
            "kv_cache_bytes": s.kv_bytes, "batch_tokens": s.batch, "repeats": self._options.repeats,
            "elapsed_s": round(time.monotonic() - self._began, 1),
        }  # fmt: skip

    @contextmanager
    def ours(self, link: str = "") -> Iterator[Callable[[], Ours]]:
        """Our pair, being started; the value waits for it. `link` paces what is between the two."""
        s, folder = self.setup, self._folder / word_of(f"ours {link}".strip())
        folder.mkdir()
        groups = {
            role: {"vllm_args": [*s.engine_args, *s.batch_args(role)], "env": s.env(role)}
            for role in ("prefill", "decode")
        }
        rdma = {"kv_buffer": s.kv_bytes, "backend": "tcp" if s.device == "cpu" else "auto"}
        if self._options.trace is not None:
            rdma["trace_file"] = str(self._options.trace.absolute())
        job = {
            "model": {
                "name": str(self.model), "max_model_len": s.max_model_len, "dtype": "bfloat16",
                "block_size": s.block,
                **({"gpu_memory_utilization": GPU_SHARE} if s.device == "cuda" else {}),
            },
            **groups,
            "rdma": {**rdma, **({"link": link} if link else {})},
            "orchestrator": {"health_timeout_s": 60},
        }  # fmt: skip
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(job))

        with Cluster(path, load_job(path), RunDir(folder / "run")) as cluster:

            def wait() -> Ours:
                cluster.wait_ready(START_TIMEOUT_S, on_stage=self.say)
                client = Client(cluster.url, cluster.api_key, self.model.name)
                system = Ours(client, DECODE_TOKENS)
                if link:
                    system.name = f"{Ours.name} paced {link}"
                self.say(f"{system.name}: {asyncio.run(system.transport())}")
                return system

            yield wait

    @contextmanager
    def nixl(self, name: str) -> Iterator[Callable[[], Nixl]]:
        """A NIXL pair, being started; the value waits for it."""
        s, (connector, variables) = self.setup, NIXL[name]
        on_gpu = s.device == "cuda"
        env = {**(variables if on_gpu else {}), "UCX_PROTO_INFO": "y"}
        folder = self._folder / name
        folder.mkdir()
        engines = [
            NixlEngine([*s.server_args, *s.batch_args(role)], env={**s.env(role), **env})
            for role in ("prefill", "decode")
        ]
        with ExitStack() as stack:
            servers = start_nixl_servers(
                folder, stack, self.model, engines, connector=connector,
                buffer_device=s.device,
            )  # fmt: skip

            def wait() -> Nixl:
                for server in servers:
                    server.wait_ready()
                system = Nixl(
                    servers, DECODE_TOKENS, pauses=not on_gpu, name=name, model=self.model.name
                )
                system.signal(signal.SIGSTOP)
                self.say(f"{name}: {connector} {env}")
                return system

            yield wait
            self._name_transport(name, folder)

    def _name_transport(self, name: str, folder: Path) -> None:
        """What UCX itself says that it moved GPU memory by."""
        lines = [
            line.split("|", 1)[-1].strip()
            for log in sorted(folder.glob("*.log"))
            for line in log.read_text(errors="replace").splitlines()
            if "cuda" in line and any(word in line for word in ("ucp_get", "ucp_put", "emulation"))
        ]
        if lines:
            self.figures[f"{word_of(name)}_ucx_says"] = sorted(set(lines))[:6]
            self.say(f"{name}, UCX: " + "; ".join(sorted(set(lines))[:6]))


def card() -> dict[str, str]:
    """The GPU, without a context of our own on it; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.used", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    if not found:
        return {}
    name, driver, used = (part.strip() for part in found[0].split(","))
    return {"card": name, "cards": str(len(found)), "driver_version": driver, "gpu_memory": used}


def compare(bench: Bench, one: OneEngine, pair: System, options: argparse.Namespace) -> None:
    """Ask the one engine and a pair in turn; print the table and keep the figures."""
    lengths = [int(n) for n in options.lengths.split(",")]

    def figures(results: dict[tuple[str, int], Samples]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for tokens in lengths:
            alone, paired = results[one.name, tokens], results[pair.name, tokens]
            if not alone.count or not paired.count:
                continue
            key = key_of(pair.name, tokens)
            found |= figures_of(paired, key)
            found[f"{key}_one_engine_beside_it_ttft_ms"] = round(alone.ttft * 1e3, 2)
            found[f"{key}_ttft_ratio_to_one_engine"] = round(paired.ttft / alone.ttft, 4)
        return found

    def after_round(number: int, results: dict[tuple[str, int], Samples]) -> None:
        bench.say(f"{pair.name}: round {number} of {options.repeats}" + " (warm-up)" * (not number))
        bench.save(figures(results))

    repeats = options.slow_repeats if pair.name == "nixl" else options.repeats
    results = asyncio.run(measure([one, pair], lengths, repeats, bench.prompt, after_round))
    bench.figures |= figures(results)
    paced = " (the link between the engines is PACED)" if "paced" in pair.name else ""
    print_table(
        results, lengths, [one.name, pair.name],
        f"Time to first token, {options.mode}: median of {repeats} (min to max){paced}",
    )  # fmt: skip


def run(bench: Bench, options: argparse.Namespace) -> None:
    """Every pair in turn, the first one started together with the one engine."""
    pairs: list[tuple[str, Any]] = []
    if options.link:
        pairs = [(f"ours at {link}", bench.ours(link)) for link in options.link.split(",")]
    elif options.saturation:
        pairs = [("ours", bench.ours())]
    else:
        for name in options.systems.split(","):
            pairs.append((name, bench.ours() if name == "ours" else bench.nixl(name)))
    bench.one.start()
    one = OneEngine(Client(bench.one.url, model=bench.model.name), DECODE_TOKENS)
    for name, pair in pairs:
        try:
            with pair as wait:
                bench.one.wait_ready()
                bench.say("one engine: ready")
                system = wait()
                bench.say(f"{name}: ready; {card()}")
                if options.saturation:
                    bench.figures |= bench_gpu_load.measure_load(bench, one, system)
                else:
                    compare(bench, one, system, options)
        except (ClusterError, RuntimeError, OSError, asyncio.TimeoutError) as error:
            if name.startswith("ours"):
                raise
            # The other pairs' figures are worth having.
            bench.say(f"{name} is left out: {error!r}")
            bench.figures[f"{word_of(name)}_error"] = repr(error)[-400:]
        bench.save()


def main() -> None:
    """Start everything, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--mode", choices=["eager", "graphs"], default="eager")
    parser.add_argument("--systems", default="ours,nixl-best", help=f"of ours,{','.join(NIXL)}")
    parser.add_argument("--lengths", default="128,1024,4096,8192,16384,32000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=2, help="of nixl with its defaults")
    parser.add_argument("--link", help="pace our engines' link, e.g. 25GB/s or 12.5GB/s+5us")
    parser.add_argument("--saturation", action="store_true", help="throughput and gaps under load")
    parser.add_argument("--trace", type=Path, help="our writes, for analysis/timeline.py")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file, rewritten after every round")
    parser.add_argument(
        "--keep", type=Path, help="logs and run folders, in a folder of their own here"
    )
    options = parser.parse_args()
    # What is started here must end when a time limit ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        if options.keep is not None:
            # A run folder of an earlier run would be taken for this one's.
            options.keep.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=options.keep))
        bench = Bench(options, folder, stack)
        run(bench, options)
        if options.link:
            bench.figures["paced_link"] = options.link
        bench.save()
    print("RESULT " + json.dumps({**bench.figures, **bench.about()}))


if __name__ == "__main__":
    main()
