# SPDX-License-Identifier: Apache-2.0
"""The native engine beside memcpy, a raw TCP stream and NIXL, over loopback.

Two processes. Blocks are scattered over a 256 MiB region on both sides; time is one way, from the
first write call to the receiver having seen the signal, both in Python, on one CLOCK_MONOTONIC.
Rounds are interleaved, every block of every round is verified by checksum.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import random
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rdma_kv_cache._native import checksum
from tests.bench.engine_transports import (
    TIMEOUT_S,
    Case,
    Nixl,
    Ours,
    RawTcp,
    RawTcpReceiver,
    Transport,
    nixl_version,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from tests.bench.engine_transports import Region

REGION_BYTES = 256 << 20
GRID = [("1x4KiB", 1, 4 << 10), ("4096x4KiB", 4096, 4 << 10), ("1024x32KiB", 1024, 32 << 10),
        ("256x128KiB", 256, 128 << 10), ("16x4MiB", 16, 4 << 20)]  # fmt: skip
#: The receiver is in its wait by then.
ARMED_S = 0.003

Seconds = dict[tuple[str, str], list[float]]


def scatter(name: str, count: int, nbytes: int, rng: np.random.Generator) -> Case:
    """Distinct random slots on both sides, no two rows adjacent on both."""
    slots = REGION_BYTES // nbytes
    while True:
        src, dst = (rng.permutation(slots)[:count].astype(np.int64) for _ in range(2))
        if not np.any((np.diff(src) == 1) & (np.diff(dst) == 1)):
            return Case(name, count, nbytes, src * nbytes, dst * nbytes)


def digests(region: Region, offsets: np.ndarray[Any, np.dtype[np.int64]], nbytes: int) -> bytes:
    """Checksums of the blocks at `offsets`."""
    lengths = np.full(len(offsets), nbytes, np.int64)
    return checksum(region.ctypes.data + offsets, lengths).tobytes()


def make_transports(region: Region, receiver: bool, nixl: bool) -> dict[str, Transport]:
    """The transports of one process, by name."""
    side = "receiver" if receiver else "sender"
    transports: dict[str, Transport] = {
        "ours": Ours(region, 2 if receiver else 1),
        "raw_tcp": RawTcpReceiver(region) if receiver else RawTcp(region),
    }
    if nixl:
        transports["nixl_tcp"] = Nixl(region, f"{side}-tcp", "tcp")
        transports["nixl_default"] = Nixl(region, f"{side}-default", "")
    return transports


def receive(pipe: Connection, nixl: bool) -> None:
    """The receiving process: does what the sender asks until the pipe closes."""
    region = np.full(REGION_BYTES, 255, np.uint8)  # not zeros: every page must be there
    transports = make_transports(region, receiver=True, nixl=nixl)
    pipe.send({name: transport.invite() for name, transport in transports.items()})
    for name, invitation in pipe.recv().items():
        transports[name].connect(invitation)
    pipe.send("connected")
    while (order := pipe.recv()) is not None:
        name, case = order
        pipe.send("armed")
        transports[name].receive(case)
        seen = time.monotonic()
        contiguous = np.arange(case.count, dtype=np.int64) * case.nbytes
        pipe.send(
            (seen, digests(region, contiguous if name == "raw_tcp" else case.dst, case.nbytes))
        )
    for transport in transports.values():
        transport.close()


class Sender:
    """The measuring process."""

    def __init__(self, nixl: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=receive, args=(far, nixl), daemon=True)
        self.process.start()
        far.close()
        rng = np.random.default_rng(7)
        self.region = rng.integers(0, 256, REGION_BYTES, np.uint8)
        self.target = np.full(REGION_BYTES, 255, np.uint8)
        self.transports = make_transports(self.region, receiver=False, nixl=nixl)
        invitations = self._receive()
        self.pipe.send({name: t.invite() for name, t in self.transports.items()})
        for name, transport in self.transports.items():
            transport.connect(invitations[name])
        self._receive()

    def _receive(self) -> Any:
        if not self.pipe.poll(TIMEOUT_S * 2):
            raise TimeoutError("the receiving process gave no answer")
        return self.pipe.recv()

    def measure(self, name: str, case: Case, stamp: int) -> float:
        """Seconds of one verified transfer."""
        words = self.region.view(np.uint64).reshape(-1, case.nbytes // 8)
        words[:, 0] = stamp + np.arange(len(words), dtype=np.uint64)
        if name == "memcpy":
            return self._copy(case)
        transport = self.transports[name]
        transport.prepare(case)
        self.pipe.send((name, case))
        self._receive()
        time.sleep(ARMED_S)
        start = time.monotonic()
        transport.send(case)
        seen, landed = self._receive()
        transport.settle()
        source = np.arange(case.count, dtype=np.int64) * case.nbytes
        if landed != digests(self.region, source if name == "raw_tcp" else case.src, case.nbytes):
            raise RuntimeError(f"{name} {case.name}: the received blocks differ")
        return float(seen - start)

    def _copy(self, case: Case) -> float:
        source = self.region.reshape(-1, case.nbytes)
        target = self.target[: case.total].reshape(-1, case.nbytes)
        slots = case.src // case.nbytes
        start = time.monotonic()
        np.take(source, slots, axis=0, out=target, mode="clip")
        return time.monotonic() - start

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(10)
        self.process.kill()
        for transport in self.transports.values():
            transport.close()


def run(sender: Sender, rounds: int, show: Callable[[str], None]) -> tuple[Seconds, dict[str, int]]:
    """Interleaved rounds in shuffled order; also descriptors of ours after coalescing."""
    rng = np.random.default_rng(1)
    order = random.Random(1)
    names = ["memcpy", *sender.transports]
    seconds: Seconds = {(case, name): [] for case, _, _ in GRID for name in names}
    after: dict[str, int] = {}
    ours = sender.transports["ours"]
    assert isinstance(ours, Ours)
    for turn in range(rounds + 1):
        show(f"round {turn} of {rounds}" + (" (warm-up)" if turn == 0 else ""))
        for name, count, nbytes in GRID:
            for transport in order.sample(names, len(names)):
                case = scatter(name, count, nbytes, rng)
                before = ours.engine.stats()["descriptors_out"]
                took = sender.measure(transport, case, stamp=turn << 32)
                if transport == "ours":
                    after[name] = int(ours.engine.stats()["descriptors_out"] - before)
                if turn > 0:
                    seconds[name, transport].append(took)
    return seconds, after


def spread(values: list[float]) -> str:
    """Median and quartiles of seconds (shown in us) or bytes per second (in GB/s)."""
    low, middle, high = statistics.quantiles(values, n=4)
    if middle < 1:
        return f"{middle * 1e6:.0f} ({low * 1e6:.0f}-{high * 1e6:.0f})"
    return f"{middle / 1e9:.2f} ({low / 1e9:.2f}-{high / 1e9:.2f})"


def report(
    console: Console, seconds: Seconds, after: dict[str, int], names: list[str]
) -> dict[str, float | int | str]:
    """Prints the tables and returns the flat result."""
    result: dict[str, float | int | str] = {}
    table = Table(title="median (quartiles); one way, in GB/s, for one block in us")
    for column in ("case", "descriptors", "sliced", *names, "ours kdesc/s", "ours / raw_tcp",
                   "ours / nixl_tcp"):  # fmt: skip
        table.add_column(column, justify="right")
    for case, count, nbytes in GRID:
        row = [case, str(count), str(after[case])]
        rates: dict[str, float] = {}
        for name in names:
            took = seconds[case, name]
            rates[name] = count * nbytes / statistics.median(took) / 1e9
            row.append(spread(took if count == 1 else [count * nbytes / t for t in took]))
            result[f"{name}_{case}_GBps"] = round(rates[name], 4)
            result[f"{name}_{case}_median_us"] = round(statistics.median(took) * 1e6, 1)
        per_second = count / statistics.median(seconds[case, "ours"])
        result[f"ours_{case}_descriptors_per_s"] = round(per_second)
        row.append(f"{per_second / 1e3:.0f}")
        for other in ("raw_tcp", "nixl_tcp"):
            ratio = rates["ours"] / rates[other] if other in rates else float("nan")
            if other in rates:
                result[f"ours_over_{other}_{case}_ratio"] = round(ratio, 3)
            row.append(f"{ratio:.2f}")
        table.add_row(*row)
    console.print(table)
    return result


@click.command()
@click.option("--rounds", default=15, show_default=True, help="Measured rounds after a warm-up.")
def main(rounds: int) -> None:
    """Measure; the last line is RESULT and flat JSON."""
    console = Console(width=200)
    versions = {"python": platform.python_version(), "kernel": platform.release(),
                "rdma_kv_cache": version("rdma-kv-cache"), "nixl": "absent"}  # fmt: skip
    try:
        versions["nixl"] = nixl_version()
    except ImportError as error:
        console.print(f"NIXL is skipped: {error}")
    sender = Sender(nixl=versions["nixl"] != "absent")
    try:
        seconds, after = run(sender, rounds, console.print)
    finally:
        sender.close()
    result = report(console, seconds, after, ["memcpy", *sender.transports])
    print("RESULT", json.dumps({**result, "rounds": rounds, **versions}))


if __name__ == "__main__":
    main()
