# SPDX-License-Identifier: Apache-2.0
"""Asks the service itself: /ready, /nodes and /metrics, bounded."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from rdma_kv_cache.cluster.run_dir import JobState  # noqa: TC001 (msgspec reads it at run time)
from rdma_kv_cache.watch.views import EngineView  # noqa: TC001 (the same)

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT_S = 3.0
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_CACHE = "vllm:kv_cache_usage_perc"
_TOKENS = "vllm:generation_tokens_total"
_INFLIGHT = "rdma_kv_requests_inflight"


class _Nodes(msgspec.Struct):
    state: JobState
    engines: list[EngineView]


class _Ready(msgspec.Struct):
    ready: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Target:
    """Where to ask, and with which key."""

    url: str
    key: str | None = None


@dataclass(frozen=True)
class Load:
    """Numbers of one /metrics page; None for what it does not have."""

    at: float
    """`time.monotonic()` of the page."""
    inflight: int | None = None
    tokens: float | None = None
    """Tokens generated since the engines started."""
    engines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By engine name and series."""

    def of(self, series: str) -> int | None:
        """Return the sum of one series over all engines."""
        values = [numbers[series] for numbers in self.engines.values() if series in numbers]
        return round(sum(values)) if values else None

    @property
    def running(self) -> int | None:
        """Requests that the engines compute."""
        return self.of(_RUNNING)

    @property
    def waiting(self) -> int | None:
        """Requests that wait within the engines."""
        return self.of(_WAITING)


@dataclass(frozen=True)
class Answer:
    """What the service said, or why it said nothing."""

    ready: bool = False
    reason: str = ""
    """Why it is not ready."""
    state: JobState | None = None
    """The run's state by /nodes; None if it did not tell (wrong key)."""
    engines: tuple[EngineView, ...] = ()
    load: Load | None = None
    error: str = ""
    """Why there is no answer; "" if there is one."""
    refused: bool = False
    """Whether the host is there and nothing listens at the port."""


def tokens_per_s(before: Load | None, now: Load | None) -> float | None:
    """Return the tokens generated a second between two pages; None where that is not known."""
    if before is None or now is None or before.tokens is None or now.tokens is None:
        return None
    elapsed = now.at - before.at
    # A restarted engine counts from zero again.
    return max(0.0, now.tokens - before.tokens) / elapsed if elapsed > 0 else None


async def ask_all(targets: Mapping[str, Target], timeout_s: float = TIMEOUT_S) -> dict[str, Answer]:
    """Ask all services at once."""
    if not targets:
        return {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        answers = await asyncio.gather(*(ask(session, target) for target in targets.values()))
    return dict(zip(targets, answers, strict=True))


async def ask(session: aiohttp.ClientSession, target: Target) -> Answer:
    """Ask one service. Never raises for what the network or the service does."""
    try:
        ready, nodes, load = await asyncio.gather(
            _ready(session, target), _nodes(session, target), _load(session, target)
        )
    except asyncio.TimeoutError:
        return Answer(error=f"{target.url} does not answer")
    except aiohttp.ClientConnectorError as error:
        number = error.os_error.errno
        reason = os.strerror(number) if number else str(error.os_error)
        return Answer(error=f"{target.url}: {reason}", refused=number == errno.ECONNREFUSED)
    except (aiohttp.ClientError, OSError, ValueError, msgspec.MsgspecError) as error:
        return Answer(error=f"{target.url}: {error!r}")
    engines = () if nodes is None else tuple(_with_load(e, load) for e in nodes.engines)
    return Answer(
        ready=ready.ready,
        reason=ready.reason,
        state=None if nodes is None else nodes.state,
        engines=engines,
        load=load,
    )


async def _ready(session: aiohttp.ClientSession, target: Target) -> _Ready:
    async with session.get(target.url + "/ready") as response:
        return msgspec.json.decode(await response.read(), type=_Ready)


async def _nodes(session: aiohttp.ClientSession, target: Target) -> _Nodes | None:
    page = await _page(session, target, "/nodes")
    return None if page is None else msgspec.json.decode(page, type=_Nodes)


async def _load(session: aiohttp.ClientSession, target: Target) -> Load | None:
    page = await _page(session, target, "/metrics")
    return None if page is None else parse_load(page.decode(), time.monotonic())


async def _page(session: aiohttp.ClientSession, target: Target, path: str) -> bytes | None:
    """Return a page that needs the key; None if it is not to be had: /ready says what matters."""
    headers = {} if target.key is None else {"Authorization": f"Bearer {target.key}"}
    try:
        async with session.get(target.url + path, headers=headers) as response:
            return await response.read() if response.status == 200 else None
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
        return None


def parse_load(text: str, at: float) -> Load:
    """Read a metrics page. Raises ValueError."""
    inflight: int | None = None
    tokens: float | None = None
    engines: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == _INFLIGHT:
                inflight = round(sample.value)
            elif sample.name in (_RUNNING, _WAITING, _CACHE):
                series = engines.setdefault(sample.labels.get("engine_name", ""), {})
                series[sample.name] = series.get(sample.name, 0.0) + sample.value
            elif sample.name == _TOKENS and sample.labels.get("role") != "prefill":
                # A prefill engine makes one token a request, and no client sees it.
                tokens = (tokens or 0.0) + sample.value
    return Load(at, inflight, tokens, engines)


def _with_load(engine: EngineView, load: Load | None) -> EngineView:
    series = {} if load is None else load.engines.get(engine.name, {})
    if not series:
        return engine
    return msgspec.structs.replace(
        engine,
        running=round(series.get(_RUNNING, 0.0)),
        waiting=round(series.get(_WAITING, 0.0)),
        kv_cache_used=series.get(_CACHE),
    )
