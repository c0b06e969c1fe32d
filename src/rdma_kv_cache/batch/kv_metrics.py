# SPDX-License-Identifier: Apache-2.0
"""How much KV was moved between two looks at the orchestrator's /metrics."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX = "vllm:rdma_kv_"
_TIMEOUT = aiohttp.ClientTimeout(total=10)

# (counter's short name, its labels) -> value
Counters = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True)
class Snapshot:
    """The KV counters at one moment, or why there are none."""

    counters: Counters
    missing: str = ""


async def fetch(session: aiohttp.ClientSession, base_url: str) -> Snapshot:
    """Read the KV counters from `base_url`/metrics. Never raises for a server without them."""
    url = f"{base_url}/metrics"
    try:
        async with session.get(url, timeout=_TIMEOUT) as response:
            if response.status != 200:
                return Snapshot({}, f"GET {url}: HTTP {response.status}")
            return parse(await response.text())
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        return Snapshot({}, f"GET {url}: {error or 'timeout'}")


def parse(text: str) -> Snapshot:
    """Read the KV counters from Prometheus text. Raises ValueError if it is not such text.

    What both sides count is taken from one: pages from prefill, which writes them, and failures
    from decode, which misses them. Samples without a role count, too.
    """
    counters: Counters = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not (sample.name.startswith(PREFIX) and sample.name.endswith("_total")):
                continue
            name = sample.name.removeprefix(PREFIX).removesuffix("_total")
            side = "decode" if name == "transfers_failed" else "prefill"
            if sample.labels.get("role", side) == side:
                counters[name, tuple(sorted(sample.labels.items()))] = sample.value
    return Snapshot(counters)


class KvFigures:
    """Differences of two snapshots; each figure is a text, "n/a: why" if it is not known."""

    def __init__(self, before: Snapshot, after: Snapshot) -> None:
        self._missing = after.missing or before.missing
        self._sums: dict[str, float] = {}
        for (name, labels), value in after.counters.items():
            earlier = before.counters.get((name, labels), 0.0)
            # A smaller value means that the engine was restarted and counts from zero.
            increase = value - earlier if value >= earlier else value
            self._sums[name] = self._sums.get(name, 0.0) + increase

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, figure) lines for the summary."""
        return [
            ("KV moved", self._show(lambda get: format_bytes(get("bytes")))),
            ("KV rate while moving", self._show(self._rate)),
            ("KV descriptors asked for", self._show(lambda get: f"{get('descriptors'):,.0f}")),
            ("KV writes after coalescing", self._show(lambda get: f"{get('writes'):,.0f}")),
            ("KV transfers", self._show(lambda get: f"{get('transfers'):,.0f}")),
            ("KV transfers failed", self._show(lambda get: f"{get('transfers_failed'):,.0f}")),
            ("KV hidden behind prefill", self._show(self._hidden)),
        ]

    def _show(self, figure: Callable[[Callable[[str], float]], str]) -> str:
        if self._missing:
            return f"n/a: {self._missing}"
        if not self._sums:
            return f"n/a: the server's /metrics has no {PREFIX}* counters"
        try:
            return figure(self._sums.__getitem__)
        except KeyError as error:
            return f"n/a: the server's /metrics has no {PREFIX}{error.args[0]}_total"

    def _rate(self, get: Callable[[str], float]) -> str:
        busy_s = get("busy_seconds")
        return f"{get('bytes') / busy_s / 1e9:.3g} GB/s" if busy_s else "n/a: no KV was moved"

    def _hidden(self, get: Callable[[str], float]) -> str:
        busy_s = get("busy_seconds")
        if not busy_s:
            return "n/a: no KV was moved"
        return f"{min(max(1 - get('exposed_seconds') / busy_s, 0.0), 1.0):.1%}"


def format_bytes(count: float) -> str:
    """Return `count` bytes in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
