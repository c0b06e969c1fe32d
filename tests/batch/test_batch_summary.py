# SPDX-License-Identifier: Apache-2.0
"""The figures at the end: measured, or "n/a" with the reason."""

from __future__ import annotations

import io
import re
from array import array
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from batch_case import request_line
from openai_peer import OpenAIPeer, answer_body
from rich.console import Console

from rdma_kv_cache.batch.display import Display
from rdma_kv_cache.batch.kv_metrics import KvFigures, Snapshot, parse
from rdma_kv_cache.batch.tally import Tally, percentile

if TYPE_CHECKING:
    from batch_case import Batch


def page(**values: float) -> str:
    """Metrics of one prefill and one decode engine."""
    lines = []
    for name, value in values.items():
        lines.append(f"# TYPE vllm:rdma_kv_{name} counter")
        for role, share in (("prefill", 1), ("decode", 3)):
            labels = f'engine_name="{role}-0",role="{role}",engine="0"'
            lines.append(f"vllm:rdma_kv_{name}_total{{{labels}}} {value * share}")
    return "\n".join(lines) + "\n"


BEFORE = page(bytes=1e9, descriptors=100, writes=10, transfers=2, transfers_failed=0,
              busy_seconds=1.0, exposed_seconds=1.0)  # fmt: skip
AFTER = page(bytes=5e9, descriptors=4100, writes=90, transfers=10, transfers_failed=1,
             busy_seconds=3.0, exposed_seconds=1.5)  # fmt: skip


def test_kv_figures_are_differences_of_one_side() -> None:
    rows = dict(KvFigures(parse(BEFORE), parse(AFTER)).rows())
    assert rows == {
        "KV moved": "3.725 GiB",
        "KV rate while moving": "2 GB/s",
        "KV descriptors asked for": "4,000",
        "KV writes after coalescing": "80",
        "KV transfers": "8",
        "KV transfers failed": "3",
        "KV hidden behind prefill": "75.0%",
    }


def test_a_restarted_engine_counts_from_zero() -> None:
    rows = dict(KvFigures(parse(page(bytes=5e9)), parse(page(bytes=1024))).rows())
    assert rows["KV moved"] == "1 KiB"


def test_unknown_figures_say_why() -> None:
    nothing_moved = dict(KvFigures(parse(BEFORE), parse(BEFORE)).rows())
    assert nothing_moved["KV rate while moving"] == "n/a: no KV was moved"
    assert nothing_moved["KV moved"] == "0 B"
    no_page = dict(KvFigures(Snapshot({}, "GET x: HTTP 404"), parse(AFTER)).rows())
    assert set(no_page.values()) == {"n/a: GET x: HTTP 404"}
    other_server = KvFigures(parse("# TYPE up gauge\nup 1\n"), parse("# TYPE up gauge\nup 1\n"))
    assert "has no vllm:rdma_kv_* counters" in dict(other_server.rows())["KV moved"]
    partial = dict(KvFigures(parse(page(bytes=1)), parse(page(bytes=2))).rows())
    assert partial["KV writes after coalescing"] == (
        "n/a: the server's /metrics has no vllm:rdma_kv_writes_total"
    )


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([7.0], 0.5, 7.0), ([3, 1, 2], 0.5, 2), (range(1, 101), 0.99, 99), ([1, 2], 0.99, 2)],
)
def test_percentile_is_nearest_rank(values: Any, share: float, expected: float) -> None:
    assert percentile(array("d", values), share) == expected


def test_summary_of_a_run(batch: Batch) -> None:
    batch.write(*(request_line(str(n)) for n in range(3)), "not json")
    with OpenAIPeer() as peer:
        peer.metrics_text = AFTER
        output = " ".join(batch.run(peer.url).output.split())
    assert re.search(r"Requests +3 ok, 1 failed, of 4", output)
    assert re.search(r"Prompt tokens +30 \([\d.,]+ tokens/s\)", output)
    assert re.search(r"Output tokens +12 \(", output)
    assert re.search(r"TTFT p50 / p99 +25.0 / 25.0 ms ", output)
    assert re.search(r"TPOT p50 / p99 +7.5 / 7.5 ms ", output)
    assert re.search(r"KV moved +0 B", output)
    assert f"Answers: {batch.out}" in output


def test_summary_without_metrics(batch: Batch) -> None:
    async def plain(body: dict[str, Any], _attempt: int) -> web.StreamResponse:
        content = answer_body(body)
        del content["metrics"]
        return web.json_response(content)

    batch.write(request_line("a"))
    with OpenAIPeer(plain) as peer:
        output = " ".join(batch.run(peer.url).output.split())
    assert "TTFT p50 / p99 n/a: no answer has metrics.time_to_first_token_ms" in output
    assert "KV moved n/a: GET" in output
    assert "HTTP 404" in output


@pytest.mark.parametrize("body", [None, [], {"usage": 3}, {"metrics": {"queue_time_ms": None}}])
def test_bodies_of_any_shape_are_counted(body: Any) -> None:
    tally = Tally()
    tally.add(body, ok=True)
    assert (tally.ok, tally.output_tokens, len(tally.ttft_ms)) == (1, 0, 0)


def test_progress_line_of_a_log() -> None:
    log = io.StringIO()
    tally = Tally()
    tally.add({"usage": {"completion_tokens": 100}}, ok=True)
    tally.wall_s = 10.0
    with Display(Console(file=log), total=3) as display:
        display.update(1, tally)
        display.update(2, tally)
    assert log.getvalue() == "1/3 done, 10.0 output tokens/s, ETA 0:00:20\n"


def test_progress_bar_of_a_terminal() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100)
    with Display(console, total=3) as display:
        display.update(1, Tally())
    assert "1/3" in terminal.getvalue()
    assert "output tokens/s, ETA ?" in terminal.getvalue()
