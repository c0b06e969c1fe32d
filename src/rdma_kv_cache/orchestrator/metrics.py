# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of the service, and the engines' own series re-exported under one roof."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import aiohttp
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rdma_kv_cache.orchestrator.admission import Admission
    from rdma_kv_cache.orchestrator.engines import Engine, Registry

log = logging.getLogger(__name__)

SCRAPE_TIMEOUT_S = 2.0
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PREFIX = "vllm:rdma_kv_"
_VLLM_SERIES = frozenset(
    {
        "vllm:generation_tokens",
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
    }
)


class Metrics:
    """The gateway's own series, in a registry of their own."""

    def __init__(self, admission: Admission, engines: Registry) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rdma_kv_requests",
            "Requests answered; status 499 means that the client went away",
            ["route", "status"],
            registry=self.registry,
        )
        self.ttft = Histogram(
            "rdma_kv_ttft_seconds",
            "Streams: from the request's arrival to the first byte from decode",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.dispatches = Counter(
            "rdma_kv_dispatches",
            "Attempts by path: pair (prefill and decode) or decode_only",
            ["path"],
            registry=self.registry,
        )
        self.retries = Counter(
            "rdma_kv_failed_attempts",
            "Attempts that an engine of this role failed before the first byte",
            ["role"],
            registry=self.registry,
        )
        self.broken_streams = Counter(
            "rdma_kv_broken_streams",
            "Streams that decode did not finish",
            registry=self.registry,
        )
        inflight = Gauge(
            "rdma_kv_requests_inflight", "Requests admitted and not ended", registry=self.registry
        )
        inflight.set_function(lambda: admission.inflight)
        self.registry.register(_EngineCollector(engines))

    async def render(self, session: aiohttp.ClientSession, engines: Iterable[Engine]) -> bytes:
        """Return the exposition text; an engine that does not answer is left out."""
        pages = await asyncio.gather(*(_scrape(session, engine) for engine in engines))
        scraped = CollectorRegistry()
        scraped.register(_Merged(page for page in pages if page is not None))
        return generate_latest(self.registry) + generate_latest(scraped)


class _EngineCollector(Collector):
    def __init__(self, engines: Registry) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        ready = Metric("rdma_kv_engine_ready", "1 if the engine takes requests", "gauge")
        inflight = Metric("rdma_kv_engine_inflight", "Legs open at the engine", "gauge")
        restarts = Metric("rdma_kv_engine_restarts", "Restarts of the engine's vLLM", "counter")
        for engine in self._engines.engines.values():
            labels = {"engine_name": engine.name, "role": engine.role}
            ready.add_sample(ready.name, labels, float(engine.ready))
            inflight.add_sample(inflight.name, labels, engine.inflight)
            restarts.add_sample(restarts.name + "_total", labels, engine.restarts)
        yield from (ready, inflight, restarts, *self._paths())

    def _paths(self) -> tuple[Metric, Metric]:
        info = Metric("rdma_kv_peer_path_info", "1: this backend carries the pair's KV", "gauge")
        slow = Metric("rdma_kv_slow_path", "1 if a faster path than this should be usable", "gauge")
        # The prefill end writes, so its word counts.
        for engine in self._engines.of_role("prefill"):
            for peer, path in engine.paths.items():
                pair = {"prefill": engine.name, "decode": peer}
                info.add_sample(info.name, {**pair, "backend": path.backend}, 1.0)
                slow.add_sample(slow.name, pair, float(bool(path.warning)))
        return info, slow


class _Merged(Collector):
    """The selected series of several engines: each family once, labelled with its engine."""

    def __init__(self, pages: Iterable[tuple[Engine, list[Metric]]]) -> None:
        self._families: dict[str, Metric] = {}
        for engine, metrics in pages:
            labels = {"engine_name": engine.name, "role": engine.role}
            for metric in metrics:
                family = self._families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    family.add_sample(sample.name, {**sample.labels, **labels}, sample.value)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def _is_selected(metric: Metric) -> bool:
    if metric.name.endswith("_created"):
        return False
    return metric.name.startswith(_PREFIX) or metric.name in _VLLM_SERIES


async def _scrape(
    session: aiohttp.ClientSession, engine: Engine
) -> tuple[Engine, list[Metric]] | None:
    timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
    try:
        async with session.get(engine.url + "/metrics", timeout=timeout) as response:
            response.raise_for_status()
            text = await response.text()
        families = [m for m in text_string_to_metric_families(text) if _is_selected(m)]
    except aiohttp.ClientResponseError as error:
        # Not the error itself: it shows the request, and with it the engines' key.
        log.warning("%s: no metrics: HTTP %d %s", engine.name, error.status, error.message)
        return None
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        log.warning("%s: no metrics: %s", engine.name, error or type(error).__name__)
        return None
    return engine, families
