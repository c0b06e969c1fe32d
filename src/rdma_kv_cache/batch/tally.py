# SPDX-License-Identifier: Apache-2.0
"""What this run measured: counts, tokens and latencies of its own requests."""

from __future__ import annotations

import math
import time
from array import array
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Figures of one run. Latencies in milliseconds; resumed lines are not in them."""

    ok: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_ms: array[float] = field(default_factory=lambda: array("d"))
    tpot_ms: array[float] = field(default_factory=lambda: array("d"))
    started: float = field(default_factory=time.monotonic)
    wall_s: float = 0.0

    def add(self, body: Any, *, ok: bool) -> None:
        """Count one finished request; `body` is the server's answer, of any shape."""
        self.ok += ok
        self.failed += not ok
        if not ok or not isinstance(body, dict):
            return
        usage, metrics = body.get("usage"), body.get("metrics")
        if isinstance(usage, dict):
            self.prompt_tokens += int(_number(usage, "prompt_tokens") or 0)
            self.output_tokens += int(_number(usage, "completion_tokens") or 0)
        if isinstance(metrics, dict):
            queue = _number(metrics, "queue_time_ms")
            first = _number(metrics, "time_to_first_token_ms")
            if queue is not None and first is not None:
                # vLLM counts the time to the first token from the end of the queue.
                self.ttft_ms.append(queue + first)
            itl = _number(metrics, "mean_itl_ms")
            if itl is not None:
                self.tpot_ms.append(itl)

    def elapsed_s(self) -> float:
        """Return the run's time so far, never 0."""
        return max(self.wall_s or time.monotonic() - self.started, 1e-9)

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, figure) lines for the summary."""
        return [
            ("Wall time", f"{self.wall_s:.1f} s"),
            ("Prompt tokens", self._rate(self.prompt_tokens)),
            ("Output tokens", self._rate(self.output_tokens)),
            ("TTFT p50 / p99", _percentiles(self.ttft_ms, self.ok, "time_to_first_token_ms")),
            ("TPOT p50 / p99", _percentiles(self.tpot_ms, self.ok, "mean_itl_ms")),
        ]

    def _rate(self, tokens: int) -> str:
        if not self.ok:
            return "n/a: no request of this run succeeded"
        return f"{tokens:,} ({tokens / self.elapsed_s():,.1f} tokens/s)"


def percentile(values: array[float], share: float) -> float:
    """Return the nearest-rank percentile of `values` (not empty)."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def _percentiles(values: array[float], answered: int, key: str) -> str:
    if not answered:
        return "n/a: no request of this run succeeded"
    if not values:
        return f"n/a: no answer has metrics.{key} (vLLM: --enable-per-request-metrics)"
    partial = "" if len(values) == answered else f" (of {len(values)} answers that have it)"
    return f"{percentile(values, 0.5):.1f} / {percentile(values, 0.99):.1f} ms{partial}"


def _number(mapping: dict[str, Any], key: str) -> float | None:
    value = mapping.get(key)
    return float(value) if isinstance(value, (int, float)) else None
