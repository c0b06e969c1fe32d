# SPDX-License-Identifier: Apache-2.0
"""What a prefill worker writes to `rdma.trace_file` can be read back and drawn."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from analysis import timeline
from rdma_kv_cache.connector.layout import KVLayout, Layer
from rdma_kv_cache.connector.outgoing import PageWrites
from rdma_kv_cache.connector.trace import Trace

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096


@pytest.fixture(params=["a tensor a layer", "layers in one block"])
def layout(request: pytest.FixtureRequest) -> KVLayout:
    """Three layers of ten blocks, laid out both ways."""
    apart = request.param == "a tensor a layer"
    stride, step = (PAGE, 10 * PAGE) if apart else (3 * PAGE, PAGE)
    layers = tuple(Layer(f"l{i}", 0, 1 << 20 | i * step, stride, PAGE) for i in range(3))
    return KVLayout(layers, (16,), 10, ((1 << 20, 30 * PAGE),))


def writes(layout: KVLayout, layer: int, blocks: list[int], after: int) -> PageWrites:
    """Pages of one layer."""
    found = layout.layers[layer]
    source = found.base + np.array(blocks, dtype=np.int64) * found.block_stride
    sizes = np.full(len(blocks), PAGE, dtype=np.int64)
    return PageWrites(source, source, sizes, after, PAGE * len(blocks))


def test_a_trace_is_read_back(tmp_path: Path, layout: KVLayout) -> None:
    path = tmp_path / "trace.jsonl"
    trace = Trace(str(path), layout)
    out: Any = SimpleNamespace(transfer_id="long", prompt_tokens=40)
    for layer in range(3):
        trace.posted(layer, out, writes(layout, layer, [7, 2, 9], after=layer))
    other: Any = SimpleNamespace(transfer_id="short", prompt_tokens=3)
    trace.posted(3, other, writes(layout, 1, [4], after=0))
    trace.computed(1, 1e9)
    for write_id in (0, 1, 2, 3):
        trace.ended(write_id, ok=True)
    trace.ended(99, ok=True)  # a probe's write

    name, tokens, found = timeline.read(path, None)
    assert (name, tokens) == ("long", 40)
    assert [(w.first, w.last, w.nbytes) for w in found] == [(n, n, 3 * PAGE) for n in range(3)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["layers"] for line in lines] == [[0, 0], [1, 1], [2, 2], [1, 1]]
    # Without a mark a write's bytes are final when it is posted; layer 2 was never seen to wait.
    assert lines[0]["computed"] == lines[0]["posted"]
    assert lines[1]["computed"] == 1e9
    assert lines[2]["computed"] is None
    assert found[2].computed == found[2].done
    with pytest.raises(ValueError, match="no transfer other"):
        timeline.read(path, "other")


def test_without_a_path_nothing_is_kept(layout: KVLayout) -> None:
    trace = Trace("", layout)
    out: Any = SimpleNamespace(transfer_id="t", prompt_tokens=40)
    trace.posted(1, out, writes(layout, 0, [1], after=5))
    trace.computed(1, 1.0)
    trace.ended(1, ok=True)
    assert trace._open == {}
