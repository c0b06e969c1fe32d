# SPDX-License-Identifier: Apache-2.0
"""Whether memory and RDMA objects stay flat over many connect, transfer, close cycles.

python -m tests.verbs.cycles --cycles 10000
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import NamedTuple

from tests.guest import run_guests, why_not
from tests.verbs.lab import GUEST_ENVIRONMENT

SAMPLES = 50
WARM_UP = 0.1  # of the samples
#: Allocators give back and take pages in their own time; a leak of 1 KiB a cycle exceeds it soon.
NOISE_BYTES = 384 << 10
SECONDS_A_CYCLE = 1.0  # far more than measured


class Flatness(NamedTuple):
    """What the samples after the warm-up say."""

    cycles: int
    first: dict[str, int]
    last: dict[str, int]
    rss_bytes_a_cycle: float
    wall_s: float

    @property
    def grown(self) -> list[str]:
        """What is not flat; empty if all is."""
        counts = [
            f"{name}: {count} at first, {self.last[name]} at last"
            for name, count in self.first.items()
            if name not in ("cycle", "rss_bytes") and self.last[name] != count
        ]
        grown = self.rss_bytes_a_cycle * (self.last["cycle"] - self.first["cycle"])
        if grown > NOISE_BYTES:
            counts.append(f"RSS: {self.rss_bytes_a_cycle:.0f} bytes a cycle")
        return counts


def run_cycles(cycles: int, samples: int = SAMPLES) -> Flatness:
    """Runs them in one guest, in one process, between two engines that stay."""
    run = run_guests(
        [sys.executable, "-m", "tests.verbs.cycle_loop", str(cycles), str(samples)],
        env=GUEST_ENVIRONMENT,
        timeout_s=120 + cycles * SECONDS_A_CYCLE,
    ).check()
    taken = [json.loads(line) for line in run.output[0].splitlines()]
    warm = taken[int(len(taken) * WARM_UP) :]
    x, y = ([sample[name] for sample in warm] for name in ("cycle", "rss_bytes"))
    slope = statistics.linear_regression(x, y).slope
    return Flatness(cycles, warm[0], warm[-1], slope, run.wall_s)


def main() -> int:
    """Returns the exit status: 1 if anything grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.verbs.cycles", description=__doc__)
    parser.add_argument("--cycles", type=int, default=10_000)
    options = parser.parse_args()
    if reason := why_not():
        print(f"no guest can start here: {reason}", file=sys.stderr)
        return 2
    flatness = run_cycles(options.cycles)
    print(f"{'':14} {'after 10 %':>12} {'at the end':>12}")
    for name, first in flatness.first.items():
        print(f"{name:14} {first:12} {flatness.last[name]:12}")
    print("flat" if not flatness.grown else f"NOT flat: {'; '.join(flatness.grown)}")
    print(f"RESULT {json.dumps({**flatness._asdict(), 'grown': flatness.grown})}")
    return int(bool(flatness.grown))


if __name__ == "__main__":
    sys.exit(main())
