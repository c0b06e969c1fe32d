# SPDX-License-Identifier: Apache-2.0
"""What a descriptor costs before any NIC is involved, natively and from Python.

Native: the engine's own steps, from rows to posted WRs, onto a provider that completes WRs at once
and moves nothing (`rkv_posting_bench`). Python: one `Engine.write()` of 4,096 scattered rows, and
what the connector does to make the rows of 4,096 pages; each beside the native time of the same.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rdma_kv_cache.connector.layout import KVLayout, Layer
from rdma_kv_cache.connector.metadata import PrefillChunk
from rdma_kv_cache.connector.outgoing import Outgoing
from tests.engine.node import Node

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 4096
PAGE_BYTES = 4096
LAYERS = 32
TIMEOUT_S = 120.0


def run_native(program: Path) -> list[dict[str, Any]]:
    """The cases of rkv_posting_bench."""
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return [json.loads(line) for line in done.stdout.splitlines()]


def median_us(call: Callable[[], Any], after: Callable[[], Any], repeats: int) -> float:
    """Microseconds of `call`; `after` is not timed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        after()
    return statistics.median(times) * 1e6


def time_write(repeats: int) -> float:
    """Microseconds of Engine.write() of ROWS rows that do not coalesce."""
    near, far = Node(1, 2 * ROWS * PAGE_BYTES), Node(2, 2 * ROWS * PAGE_BYTES)
    near.connect(far.invite())
    far.connect(near.invite())
    near.next_event("CONNECTED")
    source = near.base + np.random.default_rng(1).permutation(ROWS) * 2 * PAGE_BYTES
    target = near.remote_base + np.random.default_rng(2).permutation(ROWS) * 2 * PAGE_BYTES
    nbytes = np.full(ROWS, PAGE_BYTES, np.int64)
    took = median_us(
        lambda: near.engine.write(near.endpoint.peer, source, target, nbytes),
        lambda: near.next_event("TRANSFER_DONE"),
        repeats,
    )
    near.close()
    far.close()
    return took


def make_outgoing() -> Outgoing:
    """A transfer of ROWS pages over LAYERS layers, all of them computed."""
    pages = ROWS // LAYERS
    layers = tuple(
        Layer(f"layer.{i}", 0, (i + 1) << 32, PAGE_BYTES, PAGE_BYTES) for i in range(LAYERS)
    )
    layout = KVLayout(layers, (1,), pages + 1, ((1 << 32, LAYERS << 32),))
    out = Outgoing("request", "transfer", pages, layout)
    blocks = np.random.default_rng(3).permutation(np.arange(1, pages + 1)).tolist()
    out.add_chunk(PrefillChunk("request", "transfer", pages, pages, [blocks], restart=True))
    peer: Any = SimpleNamespace(remote=SimpleNamespace(layers=layout.describe()))
    out.set_target(peer, 1, [blocks[::-1]], 0.0)
    out.ready[:] = pages
    return out


def time_rows(repeats: int, *, by_layer: bool) -> float:
    """Microseconds to make the rows of ROWS pages, in one call or layer by layer."""
    times = []
    for _ in range(repeats):
        out = make_outgoing()
        start = time.perf_counter()
        for layers in [[i] for i in range(LAYERS)] if by_layer else [range(LAYERS)]:
            out.take_writes(layers)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


@click.command(help=__doc__)
@click.argument("program", type=click.Path(exists=True, path_type=Path))
@click.option("--repeats", default=200, show_default=True, help="Of each Python case.")
def main(program: Path, repeats: int) -> None:
    """Print a table and the RESULT line."""
    cases = run_native(program)
    figures: dict[str, float | str] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    table = Table("rows", "pattern", "prepare ns", "post ns", "ns a descriptor")
    for case in cases:
        total = case["prepare_ns"] + case["post_ns"]
        figures[f"{case['pattern']}_{case['rows']}_ns_per_descriptor"] = round(total, 2)
        table.add_row(str(case["rows"]), case["pattern"], f"{case['prepare_ns']:.1f}",
                      f"{case['post_ns']:.1f}", f"{total:.1f}")  # fmt: skip
    fragmented = next(c for c in cases if (c["rows"], c["pattern"]) == (ROWS, "fragmented"))
    native_us = fragmented["prepare_ns"] * ROWS / 1e3
    write_us = time_write(repeats)
    python = Table("Python, 4,096 descriptors", "µs")
    python.add_row("Engine.write(), whole call", f"{write_us:.1f}")
    python.add_row("  of which native preparation", f"{native_us:.1f}")
    python.add_row("  Python's share", f"{write_us - native_us:.1f}")
    figures |= {"write_call_us": round(write_us, 1), "write_native_us": round(native_us, 1),
                "write_python_us": round(write_us - native_us, 1)}  # fmt: skip
    for name, by_layer in (("one call", False), (f"{LAYERS} calls, one a layer", True)):
        took = time_rows(repeats, by_layer=by_layer)
        python.add_row(f"connector: rows of 4,096 pages, {name}", f"{took:.1f}")
        figures["rows_by_layer_us" if by_layer else "rows_at_once_us"] = round(took, 1)
    console = Console(width=100)
    console.print(table)
    console.print(python)
    print("RESULT", json.dumps(figures))


if __name__ == "__main__":
    main()
