# SPDX-License-Identifier: Apache-2.0
"""The verbs engine beside perftest, NIXL and Mooncake's transfer engine, all on one RDMA device.

Runs where the device is: `make bench-verbs` runs it in a guest with Soft-RoCE. Every system is two
processes on that machine. Blocks are scattered over 256 MiB on both sides; time is from the call
until the sender knows that everything is in place, and the first batch of each shape is compared
byte by byte. perftest writes one and the same block again and again, with its pipe always full,
at the batch's queue depth; the best of its settings counts, and ours_stream stands beside it: two
batches queued at any time; ours_gather is the same with contiguous targets. NIXL and Mooncake are used from Python, as vLLM does, and so is the
engine a second time: ours_python.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import verbs_perftest as perftest
from tests.bench.verbs_peers import PEERS, SPIN_US, Device
from tests.bench.verbs_program import Program

if TYPE_CHECKING:
    from collections.abc import Callable

KIB, MIB = 1 << 10, 1 << 20
BLOCKS = (KIB, 4 * KIB, 64 * KIB, MIB)
BATCHES = (1, 128, 4096)
#: Messages of a latency run, by size: about a second each in an emulated guest.
PINGPONGS = {64: 1000, KIB: 1000, 4 * KIB: 500, 64 * KIB: 100}
#: A turn repeats small batches until it has moved this much, and counts their median.
TURN_BYTES, MAX_REPEATS = 4 * MIB, 64
#: 4 GiB take 45 s in an emulated guest: such a batch has one turn, for these and for the first
#: settings of perftest. Mooncake's completions time out in it.
LARGE_BYTES, LARGE_ROUNDS = 1 << 30, 1
LARGE_SYSTEMS = ("ours", "nixl")
LARGE_SETTINGS = 2
#: The rest is measured without them if they fail.
THIRD_PARTY = ("nixl", "mooncake")
#: A stream moves this much, in at least so many batches.
STREAM_BYTES, MIN_STREAMED = 24 * MIB, 4
#: perftest's settings that stay after the first round.
KEPT_SETTINGS = 2

Values = dict[str, list[float]]


@dataclass(frozen=True)
class Cell:
    """`batch` blocks of `nbytes`."""

    batch: int
    nbytes: int

    @property
    def name(self) -> str:
        return f"{self.batch}x{size_name(self.nbytes)}"

    @property
    def total(self) -> int:
        return self.batch * self.nbytes

    @property
    def repeats(self) -> int:
        return max(1, min(MAX_REPEATS, TURN_BYTES // self.total))

    @property
    def streamed(self) -> int:
        """Batches of a stream; 0: perftest itself waits for each block, or one batch is a stream."""
        if self.batch == 1 or self.large:
            return 0
        return max(MIN_STREAMED, STREAM_BYTES // self.total)

    @property
    def large(self) -> bool:
        return self.total >= LARGE_BYTES


GRID = [Cell(batch, nbytes) for nbytes in BLOCKS for batch in BATCHES]


def size_name(nbytes: int) -> str:
    """Such as 4KiB."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes // unit}{name}"
    return f"{nbytes}B"


def start_programs(native: Path, device: Device, show: Callable[[str], None]) -> dict[str, Program]:
    """All systems but perftest. A peer that does not start is left out, with the reason."""
    config = [f"devices={device.name}", f"gid_index={device.gid_index}", f"spin_us={SPIN_US}"]
    programs = {"ours": Program([str(native), *config])}
    for name, peer in PEERS.items():
        script = str(ROOT / "tests/bench/verbs_writer.py")
        place = [device.name, str(device.gid_index), device.address]
        try:
            programs["ours_python" if name == "ours" else name] = Program(
                [sys.executable, script, name, *place], peer.environment(device)
            )
        except RuntimeError as error:
            if name == "ours":
                raise
            show(f"{name} is left out: {error}")
    return programs


class Bench:
    """All figures: bytes per second by cell and system, seconds by size and system."""

    def __init__(
        self, programs: dict[str, Program], device: Device, show: Callable[[str], None]
    ) -> None:
        self.programs = programs
        self.systems = ["perftest", "ours_stream", "ours_gather", *programs]
        self.device = device
        self.show = show
        self.order = random.Random(1)
        self.rates: dict[Cell, Values] = {cell: defaultdict(list) for cell in GRID}
        self.latencies: dict[int, Values] = {size: defaultdict(list) for size in PINGPONGS}
        self.settings = {cell: perftest.settings(cell.batch, cell.nbytes) for cell in GRID}
        self.began = time.monotonic()
        for name in THIRD_PARTY:
            if name in programs:
                programs[name].pause()

    def run(self, rounds: int) -> None:
        """Interleaved rounds; the first one also chooses perftest's settings."""
        for turn in range(rounds):
            for cell in GRID:
                if not cell.large or turn < LARGE_ROUNDS:
                    self.measure(cell, turn)
            for size, messages in PINGPONGS.items():
                self.measure_latency(size, messages)
            if turn == 0:
                self.settings = {cell: self.best_settings(cell)[:KEPT_SETTINGS] for cell in GRID}

    def best_settings(self, cell: Cell) -> list[str]:
        """The best first."""
        rates = self.rates[cell]
        measured = [setting for setting in self.settings[cell] if rates[setting]]
        return sorted(measured, key=lambda s: -statistics.median(rates[s]))

    def measure(self, cell: Cell, turn: int) -> None:
        """One turn of every system at a cell, in shuffled order."""
        tasks: dict[str, Callable[[], float]] = {
            name: partial(self.rate, name, cell)
            for name in self.programs
            if not cell.large or name in LARGE_SYSTEMS
        }
        if cell.streamed:
            tasks["ours_stream"] = partial(self.stream_rate, "stream", cell)
            tasks["ours_gather"] = partial(self.stream_rate, "gather", cell)
        settings = self.settings[cell][:LARGE_SETTINGS] if cell.large else self.settings[cell]
        for setting in settings:
            tasks[setting] = partial(perftest.bandwidth, self.device, cell.nbytes, setting)
        for name in self.order.sample(list(tasks), len(tasks)):
            try:
                self.rates[cell][name].append(tasks[name]())
            except RuntimeError as error:
                if name not in THIRD_PARTY:
                    raise
                self.show(f"{name} is left out from here on: {error}")
                del self.programs[name], self.rates[cell][name]
        rates = {name: self.rates[cell][name] for name in tasks if name in self.rates[cell]}
        now = ", ".join(f"{name} {values[-1] / 1e6:.1f}" for name, values in rates.items())
        self.show(f"{time.monotonic() - self.began:4.0f} s  round {turn}  {cell.name} MB/s: {now}")

    def rate(self, name: str, cell: Cell) -> float:
        """Bytes per second of a turn."""
        program = self.programs[name]
        if name in THIRD_PARTY:
            program.resume()
        order = f"write {cell.nbytes} {cell.batch} {cell.repeats}"
        seconds: list[float] = program.ask(order)["seconds"]
        if name in THIRD_PARTY:
            program.pause()
        return cell.total / statistics.median(seconds)

    def stream_rate(self, verb: str, cell: Cell) -> float:
        """Bytes per second of the engine with its queue never empty."""
        order = f"{verb} {cell.nbytes} {cell.batch} {cell.streamed}"
        seconds: float = self.programs["ours"].ask(order)["seconds"]
        return cell.total * cell.streamed / seconds

    def measure_latency(self, size: int, messages: int) -> None:
        """One run of each of both."""
        values = self.latencies[size]
        ours = self.programs["ours"].ask(f"pingpong {size} {messages}")
        theirs = perftest.latency(self.device, size, messages)
        for percentile, other in zip(("p50", "p99"), theirs, strict=True):
            values[f"ours_{percentile}"].append(ours[f"engine_{percentile}_us"])
            values[f"perftest_{percentile}"].append(other * 1e6)
            values[f"application_{percentile}"].append(ours[f"{percentile}_us"])
        now = ", ".join(f"{name} {figures[-1]:.1f}" for name, figures in values.items())
        self.show(f"{time.monotonic() - self.began:4.0f} s  latency of {size_name(size)} us: {now}")


def ratio(ours: list[float], others: list[float]) -> float:
    """The median of what was measured in the same round: load that drifts cancels out."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=False))


def spread(values: list[float], unit: float = 1.0) -> str:
    """Median, least and most."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle / unit:.1f} ({low / unit:.1f}-{high / unit:.1f})"


#: Ratios shown: of whom to whom.
RATIOS = [("ours", "perftest"), ("ours_stream", "perftest"), ("ours_gather", "ours_stream"),
          ("ours", "nixl"), ("ours", "mooncake"),
          ("ours_python", "nixl"), ("ours_python", "mooncake")]  # fmt: skip


def report_rates(console: Console, bench: Bench) -> dict[str, float | str]:
    """Prints the table of bandwidths and returns the flat result."""
    result: dict[str, float | str] = {}
    systems = bench.systems
    ratios = [(a, b) for a, b in RATIOS if a in systems and b in systems]
    table = Table(title="MB/s: median (least-most); ratios: median over rounds")
    for column in ("case", *systems, *(f"{a} / {b}" for a, b in ratios), "perftest's best"):
        table.add_column(column, justify="right")
    for cell in GRID:
        setting = bench.best_settings(cell)[0]
        rates = {**bench.rates[cell], "perftest": bench.rates[cell][setting]}
        row = [cell.name]
        for name in systems:
            row.append(spread(rates[name], 1e6) if rates.get(name) else "-")
            if rates.get(name):
                result[f"{name}_{cell.name}_GBps"] = round(statistics.median(rates[name]) / 1e9, 6)
        for a, b in ratios:
            value = ratio(rates[a], rates[b]) if rates.get(a) and rates.get(b) else None
            row.append("-" if value is None else f"{value:.2f}")
            if value is not None:
                result[f"{a}_over_{b}_{cell.name}_ratio"] = round(value, 3)
        result[f"perftest_{cell.name}_options"] = setting
        table.add_row(*row, setting)
    console.print(table)
    return result


def report_latencies(console: Console, bench: Bench) -> dict[str, float | str]:
    """Prints the table of latencies and returns the flat result."""
    result: dict[str, float | str] = {}
    table = Table(
        title="us, median (least-most) of rounds. ours: last write posted until the peer's engine "
        "reports the signal; application: half a round trip through both applications"
    )
    columns = ["ours_p50", "perftest_p50", "ours_p99", "perftest_p99", "application_p50"]
    for column in ("size", *columns, "ours / perftest p50"):
        table.add_column(column, justify="right")
    for size, values in bench.latencies.items():
        name = size_name(size)
        for column in columns:
            system, percentile = column.rsplit("_", 1)
            key = f"{system}_{name}_latency_{percentile}_us"
            result[key] = round(statistics.median(values[column]), 2)
        value = ratio(values["ours_p50"], values["perftest_p50"])
        result[f"ours_over_perftest_{name}_latency_p50_ratio"] = round(value, 3)
        table.add_row(name, *(spread(values[column]) for column in columns), f"{value:.2f}")
    console.print(table)
    return result


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Interleaved rounds.")
@click.option("--device", default="rxe0", show_default=True, help="RDMA device.")
@click.option("--gid-index", default=1, show_default=True, help="Of its RoCE v2 IPv4 GID.")
@click.option("--address", default=lambda: os.environ.get("GUEST_IP"), help="IPv4 address there.")
@click.option("--native", type=click.Path(exists=True, path_type=Path), required=True,
              help="The program rkv_verbs_bench.")  # fmt: skip
def main(rounds: int, device: str, gid_index: int, address: str, native: Path) -> None:
    """Measure; the last line is RESULT and flat JSON."""
    console = Console(width=220)
    place = Device(device, gid_index, address)
    programs = start_programs(native, place, console.print)
    versions = {f"{name}_version": program.greeting["version"] for name, program in programs.items()
                if "version" in program.greeting}  # fmt: skip
    bench = Bench(programs, place, partial(print, flush=True))
    try:
        bench.run(rounds)
    finally:
        for name, program in programs.items():
            if name in THIRD_PARTY:
                program.resume()
            program.close()
    result = {**report_rates(console, bench), **report_latencies(console, bench)}
    versions |= {"python": platform.python_version(), "kernel": platform.release(),
                 "perftest": perftest.version()}  # fmt: skip
    print("RESULT", json.dumps({**result, "rounds": rounds, "device": device, **versions}))


if __name__ == "__main__":
    main()
