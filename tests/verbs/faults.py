# SPDX-License-Identifier: Apache-2.0
"""Every fault many times: what the user saw, seconds to detection, what landed after the fence.

python -m tests.verbs.faults --runs 20
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.guest import why_not
from tests.verbs.fault_list import FAULTS, POWER_CUT, Fault, power_cut
from tests.verbs.lab import Lab
from tests.verbs.stage import Outcome, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POWER_CUT_NAME = "node power cut"
#: A guest lasts for one power cut; booting some at once saves the survivor's boot.
VICTIMS = 4
LAB_TIMEOUT_S = 7200.0


class Runs:
    """The outcomes of one fault."""

    def __init__(self, name: str, fault: Fault) -> None:
        self.name = name
        self.fault = fault
        self.outcomes: list[Outcome] = []

    def add(self, run: Callable[[], Outcome]) -> None:
        """Runs it once more; an assertion that fails is an outcome too."""
        try:
            outcome = run()
        except (AssertionError, RuntimeError, TimeoutError) as error:
            outcome = Outcome(f"(test) {error}", 0.0, problems=(str(error),))
        self.outcomes.append(outcome)
        for problem in self.problems(outcome):
            print(f"{self.name}, run {len(self.outcomes)}: {problem}", file=sys.stderr)

    def problems(self, outcome: Outcome) -> list[str]:
        """What of an outcome is not as it must be."""
        problems = list(outcome.problems)
        if not re.search(self.fault.says, outcome.saw, re.DOTALL):
            problems.append(f"the user saw: {outcome.saw}")
        if outcome.seconds > self.fault.within_s:
            problems.append(f"took {outcome.seconds:.1f} s, not {self.fault.within_s:.1f}")
        if outcome.landed:
            problems.append(f"{outcome.landed} bytes landed after the fence")
        return problems

    def figures(self) -> dict[str, Any]:
        """For the table and the last line."""
        seconds = [outcome.seconds for outcome in self.outcomes]
        return {
            "runs": len(self.outcomes),
            "failed": sum(bool(self.problems(outcome)) for outcome in self.outcomes),
            "landed_after_fence": sum(outcome.landed for outcome in self.outcomes),
            "seconds_median": round(statistics.median(seconds), 2),
            "seconds_min": round(min(seconds), 2),
            "seconds_max": round(max(seconds), 2),
            "saw": dict(Counter(outcome.saw for outcome in self.outcomes).most_common()),
        }


def run_faults(names: list[str], runs: int) -> Iterator[Runs]:
    """Runs each so many times, on the same two guests as long as both live."""
    repeatable = [name for name in names if name != POWER_CUT_NAME]
    if repeatable:
        with Lab(nodes=2, timeout_s=LAB_TIMEOUT_S) as lab:
            stage = Stage(lab)
            for name in repeatable:
                done = Runs(name, FAULTS[name])
                for _ in range(runs):
                    done.add(lambda: done.fault.run(stage))  # noqa: B023 - called at once
                yield done
    if POWER_CUT_NAME in names:
        yield cut_power(runs)


def cut_power(runs: int) -> Runs:
    """Cuts the power of guest after guest."""
    done = Runs(POWER_CUT_NAME, POWER_CUT)
    while (left := runs - len(done.outcomes)) > 0:
        victims = min(VICTIMS, left)
        with Lab(nodes=victims + 1, timeout_s=LAB_TIMEOUT_S) as lab:
            stage = Stage(lab)
            for guest in range(1, victims + 1):
                done.add(lambda: power_cut(stage, guest))  # noqa: B023 - called at once
    return done


def main() -> int:
    """Returns the exit status: 1 if anything was not as it must be."""
    names = [*FAULTS, POWER_CUT_NAME]
    parser = argparse.ArgumentParser(prog="python -m tests.verbs.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="of each fault (20)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="FAULT")
    options = parser.parse_args()
    if reason := why_not():
        print(f"no guest can start here: {reason}", file=sys.stderr)
        return 2
    start = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    print(
        "| fault | runs | as it must be | seconds: median (min to max) | landed after the fence |"
    )
    print("|---|---|---|---|---|")
    for done in run_faults(options.only, options.runs):
        row = results[done.name] = done.figures()
        print(
            f"| {done.name} | {row['runs']} | {row['runs'] - row['failed']} "
            f"| {row['seconds_median']} ({row['seconds_min']} to {row['seconds_max']}) "
            f"| {row['landed_after_fence'] or 'none'} |",
            flush=True,
        )
    for name, row in results.items():
        print(f"\n{name}:")
        for text, count in row["saw"].items():
            print(f"  {count} x {text}")
    print(f"\nRESULT {json.dumps({'wall_s': round(time.monotonic() - start), 'faults': results})}")
    return int(any(row["failed"] for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
