# SPDX-License-Identifier: Apache-2.0
"""The engine between two processes on one GPU, beside a plain device-to-device copy.

Both copy the same bytes, interleaved: the engine as pages scattered over both pools, timed from
write() until its TRANSFER_DONE; the copy as cudaMemcpyAsync of one contiguous piece, timed by
events of its stream. Times of single calls of the engine are printed too.

    python -m tests.bench.bench_gpu_engine [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from rdma_kv_cache import _native
from rdma_kv_cache._native import EventKind
from tests.gpu.ends import End, Remote

POOL = 4 << 30
SHAPES = [(16 << 10, 65536), (64 << 10, 1), (64 << 10, 32), (64 << 10, 2048), (64 << 10, 32768), (1 << 20, 2048), (64 << 20, 32)]  # fmt: skip


def ours_s(end: End, page: int, count: int, random: np.random.Generator) -> float:
    """Seconds of one write of `count` scattered pages."""
    total = POOL // page
    here, there = (random.permutation(total)[:count] * page for _ in range(2))
    began = time.perf_counter()
    end.write(here, there, page)
    while True:
        if any(event.kind == EventKind.TRANSFER_DONE for event in end.engine.poll()):
            return time.perf_counter() - began
        end.engine.wait(0.01)


def copy_s(source: torch.Tensor, target: torch.Tensor, nbytes: int) -> float:
    """Seconds of one contiguous device-to-device copy."""
    begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    target[:nbytes].copy_(source[:nbytes])
    done.record()
    done.synchronize()
    return begin.elapsed_time(done) / 1e3


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="cuda_ipc")
    parser.add_argument("--devices", default="0,0", help="GPU of the writer and of the target")
    parser.add_argument("--queue-depth", type=int, default=1024)
    options = parser.parse_args()
    here, there = map(int, options.devices.split(","))
    config = {"backend": options.backend, "queue_depth": options.queue_depth}
    remote = Remote(POOL, config, there)
    end = End(POOL, _native.EngineConfig(**config), here)
    remote.meet(end)
    end.tensor.random_(0, 256)
    target = torch.empty(POOL, dtype=torch.uint8, device=f"cuda:{there}")
    torch.cuda.synchronize()
    table = Table(
        "blocks", "plain copy GB/s", "ours GB/s", "ours/copy", "ours us", title=remote.path
    )
    result: dict[str, object] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "path": remote.path,
        "rounds": options.rounds, "queue_depth": options.queue_depth,
    }  # fmt: skip
    random = np.random.default_rng(0)
    for page, count in SHAPES:
        nbytes = page * count
        ours, copies = [], []
        for _ in range(options.rounds + 2):
            ours.append(ours_s(end, page, count, random))
            copies.append(copy_s(end.tensor, target, nbytes))
        ours, copies = ours[2:], copies[2:]
        rates = [nbytes / s / 1e9 for s in ours]
        copy_rates = [nbytes / s / 1e9 for s in copies]
        ratio = statistics.median(rates) / statistics.median(copy_rates)
        name = f"{count}x{page >> 10}K"
        table.add_row(
            name,
            f"{statistics.median(copy_rates):.0f} ({min(copy_rates):.0f}-{max(copy_rates):.0f})",
            f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})",
            f"{ratio:.2f}",
            f"{statistics.median(ours) * 1e6:.0f}",
        )
        result[f"{name}_ours_GBps"] = round(statistics.median(rates), 1)
        result[f"{name}_copy_GBps"] = round(statistics.median(copy_rates), 1)
        result[f"{name}_ratio"] = round(ratio, 3)
        result[f"{name}_ours_us"] = round(statistics.median(ours) * 1e6, 1)
    here_pages = np.arange(2048, dtype=np.int64) * 65536
    assert remote.ask("sums", here_pages, np.full(2048, 65536, dtype=np.int64)).size == 2048
    stream = torch.cuda.current_stream().cuda_stream
    began = time.perf_counter()
    for _ in range(1000):
        end.engine.mark(stream)
    result["mark_us"] = round((time.perf_counter() - began) * 1e3, 2)
    Console(width=110).print(table)
    remote.close()
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
