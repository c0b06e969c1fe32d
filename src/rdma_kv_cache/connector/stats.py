# SPDX-License-Identifier: Apache-2.0
"""Counters of the connector, carried by vLLM to its own /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTERS = {
    "bytes": "KV bytes written to decode engines.",
    "descriptors": "Page writes asked for.",
    "writes": "Writes posted after adjacent pages were merged.",
    "transfers": "Transfers completed.",
    "transfers_failed": "Transfers that ended without KV: recomputed or failed by policy.",
    "busy_seconds": "Time with bytes of a transfer in flight.",
    "exposed_seconds": "Part of busy time after the prefill's last layer was computed.",
    "checksum_pages": "Pages whose checksum was verified on arrival.",
}
HELD = "requests_held"
HELD_HELP = "Requests whose KV blocks the connector holds on this engine."


class TransferStats(KVConnectorStats):
    """Increments since the last report, plus the gauge `requests_held`."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=dict(data or {}))

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def add(self, name: str, value: float) -> None:
        """Increase one of COUNTERS."""
        self.data[name] = self.data.get(name, 0) + value

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Sum of both (TP workers, or several intervals); the gauge is the largest or newest."""
        for name, value in other.data.items():
            if name == HELD:
                self.data[name] = value
            else:
                self.add(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM logs for an interval."""
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in self.data.items()
        }

    def is_empty(self) -> bool:
        """True if there is nothing to report."""
        return not self.data


class TransferPromMetrics(KVConnectorPromMetrics):
    """`vllm:rdma_kv_*` counters and one gauge, per engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge = metric_types[Counter], metric_types[Gauge]
        self._counters = {
            name: counter(f"vllm:rdma_kv_{name}", help_text, labelnames)
            for name, help_text in COUNTERS.items()
        }
        self._held = gauge(f"vllm:rdma_kv_{HELD}", HELD_HELP, labelnames)
        # A series that exists with 0 tells "nothing happened" from "not measured".
        for values in per_engine_labelvalues.values():
            for metric in (*self._counters.values(), self._held):
                metric.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record one report of one engine."""
        values = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name == HELD:
                self._held.labels(*values).set(value)
            else:
                self._counters[name].labels(*values).inc(value)
