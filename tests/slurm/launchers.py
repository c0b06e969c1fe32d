# SPDX-License-Identifier: Apache-2.0
"""Both launchers many times, with node names that sort with and against the components.

python -m tests.slurm.launchers --runs 10

Each run submits a job with stand-ins for vLLM, waits until it is READY, and stops it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from tests.slurm import Lab, standin, why_not
from tests.slurm.stages import stages

ORDERS = {"against": ("prefill", "decode"), "with": ("decode", "prefill")}


COLUMNS = ("slurm", "ranks", "vllm", "connect", "ours", "ready", "stop")


def run(lab: Lab, launcher: str, order: str, name: str) -> dict[str, float]:
    """One job. Returns seconds by COLUMNS: stages (ours: ranks and connect), READY, end after it."""
    prefill, decode = ORDERS[order]
    job = standin.submit(
        lab,
        lab.shared / name,
        prefill={"engines": 1, "constraint": prefill},
        decode={"engines": 2, "nodes": 2, "constraint": decode},
        slurm={"launcher": launcher},
    )
    try:
        state = job.wait("READY", "FAILED", "DONE")
        ready = time.time()
        assert state.state == "READY", f"{state.reason}\n{job.logs()}"
        took = stages(job.run, job.submitted)
        job.stop()
        lab.wait_for(job.job_id, "COMPLETED")
        ours = took["ranks"] + took["connect"]
        return {**took, "ours": ours, "ready": ready - job.submitted, "stop": time.time() - ready}
    finally:
        lab.run("scancel", str(job.job_id))
        lab.wait_for(job.job_id, "COMPLETED", "CANCELLED", "FAILED")


def main() -> int:
    """Returns the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.launchers", description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="of each launcher and order (10)")
    parser.add_argument("--only", choices=["srun", "mpiexec"], help="one launcher")
    options = parser.parse_args()
    if reason := why_not():
        print(f"no Slurm can start here: {reason}", file=sys.stderr)
        return 2
    launchers = [options.only] if options.only else ["srun", "mpiexec"]
    result: dict[str, Any] = {}
    print(f"| launcher | names sort | good | {' | '.join(f'{c}, s' for c in COLUMNS)} |")
    print("|---" * (3 + len(COLUMNS)) + "|")
    with Lab() as lab:
        for launcher in launchers:
            for order in ORDERS:
                times = []
                for index in range(options.runs):
                    try:
                        times.append(run(lab, launcher, order, f"{launcher}-{order}-{index}"))
                    except AssertionError as error:
                        print(f"{launcher}, {order}, run {index}: {error}", file=sys.stderr)
                key = f"{launcher}_{order}"
                result |= {f"{key}_runs": options.runs, f"{key}_good": len(times)}
                cells = []
                for name in COLUMNS if times else ():
                    values = [took[name] for took in times]
                    median = statistics.median(values)
                    result[f"{key}_{name}_median_s"] = round(median, 2)
                    cells.append(f"{median:.1f} ({min(values):.1f} to {max(values):.1f})")
                good = f"{len(times)} of {options.runs}"
                print(f"| {launcher} | {order} | {good} | {' | '.join(cells)} |", flush=True)
    print(f"RESULT {json.dumps(result)}")
    return 0 if all(result[k] == options.runs for k in result if k.endswith("_good")) else 1


if __name__ == "__main__":
    sys.exit(main())
