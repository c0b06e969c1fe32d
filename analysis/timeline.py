# SPDX-License-Identifier: Apache-2.0
"""Draw the longest prompt of a trace (`rdma.trace_file`): its layers' computing and their bytes.

pip install 'rdma-kv-cache[analysis]'
python analysis/timeline.py trace.jsonl timeline.svg [--transfer ID]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Write:
    """One write: first and last layer, times in ms since the transfer's first."""

    first: int
    last: int
    nbytes: int
    posted: float
    computed: float
    done: float


def read(trace: Path, transfer: str | None) -> tuple[str, int, list[Write]]:
    """The transfer (by default the one with most bytes), its prompt's tokens, its writes.

    Raises ValueError if there is none.
    """
    by_transfer: dict[str, list[dict[str, Any]]] = {}
    for text in trace.read_text().splitlines():
        line = json.loads(text)
        by_transfer.setdefault(line["transfer"], []).append(line)
    if not by_transfer or (transfer is not None and transfer not in by_transfer):
        raise ValueError(f"{trace}: no transfer {transfer or ''}; there are {list(by_transfer)}")
    name = transfer or max(by_transfer, key=lambda t: sum(w["bytes"] for w in by_transfer[t]))
    lines = by_transfer[name]
    began = min(line["posted"] for line in lines)
    writes = []
    for line in lines:
        # A write that was never seen to wait ended between two looks at the GPU.
        computed = line["done"] if line["computed"] is None else line["computed"]
        posted, computed, done = (
            (t - began) * 1e3 for t in (line["posted"], computed, line["done"])
        )
        first, last = line["layers"]
        writes.append(Write(first, last, line["bytes"], posted, computed, done))
    return name, lines[0]["prompt_tokens"], sorted(writes, key=lambda w: w.posted)


def exposed_ms(writes: list[Write]) -> float:
    """From the last layer's end of computing to the last byte's arrival."""
    return max(w.done for w in writes) - max(w.computed for w in writes)


def draw(name: str, tokens: int, writes: list[Write], target: Path) -> None:
    """Write the figure; its kind follows from the file's name (.svg, .png)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    layers = 1 + max(w.last for w in writes)
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.17 * layers))
    before = 0.0
    for w in sorted(writes, key=lambda w: w.computed):
        rows, height = (w.first + w.last) / 2, 0.8 + w.last - w.first
        axes.barh(rows, w.computed - before, height, left=before, color="#c8d3e0", zorder=1)
        axes.barh(rows, w.done - w.computed, height / 2, left=w.computed, color="#d1495b", zorder=2)
        axes.plot(w.posted, rows, "|", color="#1d3557", markersize=5, zorder=3)
        before = max(before, w.computed)
    megabytes = sum(w.nbytes for w in writes) / 1e6
    axes.axvline(before, color="#666666", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="ms since the first write was posted", ylabel="layer", ylim=(layers - 0.4, -0.6),
        title=f"{tokens} tokens, {megabytes:.0f} MB: {exposed_ms(writes):.2f} ms of the transfer "
        "come after the last layer",
    )  # fmt: skip
    axes.legend(
        handles=[
            plt.Rectangle((0, 0), 1, 1, color="#c8d3e0", label="computed after the layer before"),
            plt.Rectangle((0, 0), 1, 1, color="#d1495b", label="bytes on their way"),
            plt.Line2D([], [], color="#1d3557", marker="|", linestyle="", label="posted"),
        ],
        loc="lower left", fontsize="small",
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(target, dpi=150, metadata={"Title": f"transfer {name}"})
    plt.close(figure)


def main() -> None:
    """Read, draw, say what was drawn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("target", type=Path, help="a .svg or .png file to write")
    parser.add_argument("--transfer", help="which; by default the one with most bytes")
    options = parser.parse_args()
    name, tokens, writes = read(options.trace, options.transfer)
    draw(name, tokens, writes, options.target)
    print(
        f"{options.target}: transfer {name}, {tokens} tokens, {len(writes)} writes, "
        f"exposed {exposed_ms(writes):.2f} ms"
    )


if __name__ == "__main__":
    main()
