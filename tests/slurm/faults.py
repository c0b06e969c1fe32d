# SPDX-License-Identifier: Apache-2.0
"""What happens to a serving job when parts of it are lost, many times on a real Slurm.

python -m tests.slurm.faults --runs 5

One prefill and two decode engines (stand-ins for vLLM), a node each. Seconds are from the event
until the job does what is said of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.slurm import Lab, standin, why_not
from tests.slurm.machine import poll

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.slurm.standin import Job

LIMIT_S = 60.0
OVER = ("COMPLETED", "CANCELLED", "FAILED", "NODE_FAIL", "TIMEOUT")


@dataclass(frozen=True)
class Fault:
    """An event, and what the job does then; `outcome` is asked until it is true."""

    what: str
    cause: Callable[[Job], object]
    then: str
    outcome: Callable[[Job], bool]


def engines(job: Job) -> dict[str, str]:
    """States by engine, as the orchestrator writes them."""
    return {engine.name: engine.state for engine in job.state().engines}


def serves_with(**wanted: str) -> Callable[[Job], bool]:
    """The run is READY, with these states of engines (decode_1="LOST|STOPPED")."""

    def holds(job: Job) -> bool:
        found = engines(job)
        return job.state().state == "READY" and all(
            found.get(name.replace("_", "-"), "") in states.split("|")
            for name, states in wanted.items()
        )

    return holds


def slurm_states(job: Job) -> set[str]:
    """Of all components."""
    return set(job.lab.states(job.job_id).values())


def is_over(job: Job) -> bool:
    """Slurm has no component running."""
    return all(state in OVER for state in slurm_states(job))


def kill_rank(job: Job) -> None:
    """SIGKILL to the rank that runs decode-1, and to no other process."""
    job.lab.check("bash", "-c", "pkill -KILL -f 'cli rank --config'", node="d1")


def cut_and_heal(job: Job) -> None:
    """Returns after the cut was noticed and mended."""
    job.lab.cut("d1")
    assert poll(lambda: engines(job)["decode-1"] == "LOST", LIMIT_S), job.state()
    job.lab.heal("d1")


FAULTS = [
    Fault(
        "scancel of the leader",
        lambda job: job.lab.check("scancel", str(job.job_id)),
        "ends in order",
        lambda job: is_over(job) and job.state().state == "DONE",
    ),
    Fault(
        "scancel of the decode component",
        lambda job: job.lab.check("scancel", f"{job.job_id}+1"),
        "ends with the reason that no decode engine is left",
        lambda job: job.state().state == "FAILED" and "no decode engine" in job.state().reason,
    ),
    Fault(
        "rank of a decode engine killed",
        kill_rank,
        "serves with the other one",
        serves_with(prefill_0="READY", decode_0="READY", decode_1="LOST|STOPPED"),
    ),
    Fault(
        "network of a decode node cut",
        lambda job: job.lab.cut("d1"),
        "serves with the other one",
        serves_with(prefill_0="READY", decode_0="READY", decode_1="LOST|STOPPED"),
    ),
    Fault(
        "network of a decode node cut and healed",
        cut_and_heal,
        "serves with the other one, then with both",
        serves_with(prefill_0="READY", decode_0="READY", decode_1="READY"),
    ),
    Fault(
        "slurmd of a decode node restarted",
        lambda job: (job.lab.stop_slurmd("d1"), time.sleep(3), job.lab.start_slurmd("d1")),
        "serves on, nothing lost",
        serves_with(prefill_0="READY", decode_0="READY", decode_1="READY"),
    ),
    Fault(
        "power cut of a decode node",
        lambda job: job.lab.crash("d1"),
        "serves with the other one (Slurm ends the job later)",
        serves_with(prefill_0="READY", decode_0="READY", decode_1="LOST|STOPPED"),
    ),
    Fault(
        "decode node set down",
        lambda job: job.lab.check(
            "scontrol", "update", "nodename=d1", "state=down", "reason=test"
        ),
        "Slurm ends the job: NODE_FAIL, in order",
        lambda job: is_over(job) and "NODE_FAIL" in slurm_states(job),
    ),
]  # fmt: skip


def run(lab: Lab, fault: Fault, name: str) -> float:
    """One job and one event. Returns the seconds; raises AssertionError with the logs."""
    job = standin.submit(lab, lab.shared / name)
    try:
        state = job.wait("READY", "FAILED", "DONE")
        assert state.state == "READY", job.logs()
        began = time.monotonic()
        fault.cause(job)
        assert poll(lambda: fault.outcome(job), LIMIT_S, every_s=0.1), (
            f"after {LIMIT_S:g} s: {job.state()} {lab.states(job.job_id)}\n{job.logs()}"
        )
        return time.monotonic() - began
    finally:
        lab.restore()


def main() -> int:
    """Returns the exit status: 1 if a run was not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each event (5)")
    parser.add_argument("--only", metavar="TEXT", default="", help="events with this in their name")
    options = parser.parse_args()
    if reason := why_not():
        print(f"no Slurm can start here: {reason}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {}
    print("| event | what happened | as it must be | s: median (min to max) |\n|---|---|---|---|")
    with Lab({"p0": "prefill", "d0": "decode", "d1": "decode"}) as lab:
        for fault in FAULTS:
            if options.only not in fault.what:
                continue
            times = []
            for index in range(options.runs):
                try:
                    times.append(run(lab, fault, f"{fault.what.replace(' ', '-')}-{index}"))
                except AssertionError as error:
                    print(f"{fault.what}, run {index}: {error}", file=sys.stderr)
            key = fault.what.replace(" ", "_")
            result |= {f"{key}_runs": options.runs, f"{key}_good": len(times)}
            said = "-"
            if times:
                result[f"{key}_median_s"] = round(statistics.median(times), 2)
                said = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
            row = f"| {fault.what} | {fault.then} | {len(times)} of {options.runs} | {said} |"
            print(row, flush=True)
    print(f"RESULT {json.dumps(result)}")
    return 0 if all(result[k] == options.runs for k in result if k.endswith("_good")) else 1


if __name__ == "__main__":
    sys.exit(main())
