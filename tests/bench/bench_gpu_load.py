# SPDX-License-Identifier: Apache-2.0
"""What sending and receiving KV costs busy engines: prefill's throughput, the gaps of decode."""

from __future__ import annotations

import asyncio
import statistics
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tests.bench.bench_gpu import Bench
    from tests.bench.pd_systems import OneEngine, Ours
    from tests.support.client import Client

ROUNDS = 3
PROMPT = 4096
PROMPTS = 32
QUEUED = 16
"""Prompts asked for at once: prefill has always more to do."""
STREAMS = 8
STREAM_PROMPT = 128
STREAM_TOKENS = 160
ARRIVING = 2
"""Long prompts on their way at once while the gaps are measured."""
CPU_PROMPT, CPU_PROMPTS, CPU_STREAM_TOKENS = 512, 8, 60


async def tokens_per_s(bench: Bench, client: Client, tokens: int, prompts: int) -> float:
    """Prompt tokens a second with a queue that is never empty; each answer is one token."""
    asked = [bench.prompt(tokens) for _ in range(prompts)]
    began = time.monotonic()
    await client.complete_all(asked, 1, concurrency=QUEUED)
    return prompts * tokens / (time.monotonic() - began)


async def gaps(
    bench: Bench, decode: Client, loaded: Client | None, tokens: int, stream_tokens: int
) -> list[float]:
    """Gaps between the tokens of running streams, s, while `loaded` gets long prompts."""
    began = 0.0
    finished = asyncio.Event()

    async def load() -> None:
        assert loaded is not None
        while not finished.is_set():
            await loaded.complete(bench.prompt(tokens), 1)

    async def stream() -> list[float]:
        body = decode.body(bench.prompt(STREAM_PROMPT), stream_tokens)
        return [at for at, _ in await decode.stream(body)]

    streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
    await asyncio.sleep(0.5)  # all of them run
    began = time.monotonic()
    loads = [asyncio.create_task(load()) for _ in range(ARRIVING if loaded else 0)]
    times = await asyncio.gather(*streams)
    finished.set()
    await asyncio.gather(*loads)
    return [b - a for one in times for a, b in pairwise(one) if a >= began]


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure_load(bench: Bench, one: OneEngine, ours: Ours) -> dict[str, Any]:
    """All figures, several rounds in turn; prints the tables.

    Both engines of a pair and the one engine share the card. So decode's gaps with arriving
    transfers are compared with those while the one engine computes the same prompts.
    """
    return asyncio.run(_measure(bench, one.client, ours.client))


async def _measure(bench: Bench, one: Client, ours: Client) -> dict[str, Any]:
    on_gpu = bench.setup.device == "cuda"
    tokens, prompts = (PROMPT, PROMPTS) if on_gpu else (CPU_PROMPT, CPU_PROMPTS)
    length = STREAM_TOKENS if on_gpu else CPU_STREAM_TOKENS
    rates: dict[str, list[float]] = {"one engine": [], "sending": []}
    waits: dict[str, list[float]] = {"quiet": [], "prefill elsewhere": [], "arriving": []}
    for number in range(ROUNDS + 1):
        for name, client in (("one engine", one), ("sending", ours)):
            rate = await tokens_per_s(bench, client, tokens, prompts)
            if number:
                rates[name].append(rate)
        loads = {"quiet": None, "prefill elsewhere": one, "arriving": ours}
        for name, loaded in loads.items():
            found = await gaps(bench, ours, loaded, tokens, length)
            if number:
                waits[name] += found
        bench.say(f"load: round {number} of {ROUNDS}" + " (warm-up)" * (not number))
    return _report(rates, waits, tokens)


def _report(
    rates: dict[str, list[float]], waits: dict[str, list[float]], tokens: int
) -> dict[str, Any]:
    table = Table(title=f"Prefill at saturation, prompts of {tokens} tokens: tokens/s")
    figures: dict[str, Any] = {"load_prompt_tokens": tokens}
    for heading in ("prefill", "median", "min", "max", "÷ one engine"):
        table.add_column(heading, justify="right")
    alone = statistics.median(rates["one engine"])
    for name, values in rates.items():
        median = statistics.median(values)
        table.add_row(
            name, f"{median:.0f}", f"{min(values):.0f}", f"{max(values):.0f}",
            f"{median / alone:.3f}",
        )  # fmt: skip
        figures[f"prefill_{name.replace(' ', '_')}_tokens_per_s"] = round(median, 1)
    ratio = statistics.median(rates["sending"]) / alone
    figures["prefill_sending_ratio_to_one_engine"] = round(ratio, 4)
    Console(width=100).print(table)
    table = Table(title=f"Gaps between tokens of {STREAMS} streams, ms")
    for heading in ("meanwhile", "gaps", "median", "p99", "÷ prefill elsewhere"):
        table.add_column(heading, justify="right")
    control = percentile(waits["prefill elsewhere"], 0.99)
    for name, values in waits.items():
        p99 = percentile(values, 0.99)
        table.add_row(
            name, str(len(values)), f"{statistics.median(values) * 1e3:.1f}", f"{p99 * 1e3:.1f}",
            f"{p99 / control:.3f}",
        )  # fmt: skip
        key = name.replace(" ", "_")
        figures[f"gap_{key}_median_ms"] = round(statistics.median(values) * 1e3, 2)
        figures[f"gap_{key}_p99_ms"] = round(p99 * 1e3, 2)
    p99 = percentile(waits["arriving"], 0.99)
    figures["gap_arriving_p99_ratio_to_prefill_elsewhere"] = round(p99 / control, 4)
    Console(width=100).print(table)
    return figures
