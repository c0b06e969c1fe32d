# SPDX-License-Identifier: Apache-2.0
"""What `rdma-kv status --watch` asks of Slurm's controller: RPCs by type and user, as sdiag counts.

python -m tests.slurm.rpcs --seconds 120

Watches a job that waits, and one that is READY (stand-ins for vLLM). The table has all RPCs of the
lab, the result those of commands (REQUEST_*) apart from those of its daemons (MESSAGE_*); sdiag's
own is in neither, but for the counts by user. squeue makes two: for jobs and for partitions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rdma_kv_cache.watch.watcher import CALM_INTERVAL_S
from tests.slurm import Lab, standin, why_not
from tests.slurm.standin import RDMA_KV

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.slurm.standin import Job

OWN = "REQUEST_STATS_INFO"
COMMANDS = "REQUEST_"
SECTION = re.compile(r"Remote Procedure Call statistics by (message type|user)")
ROW = re.compile(r"\s+(\S+)\s+\( *\d+\) count:(\d+)")


def parse(text: str) -> Counter[tuple[str, str]]:
    """Counts by ("message type" or "user", its name), out of what sdiag prints."""
    counts: Counter[tuple[str, str]] = Counter()
    section = ""
    for line in text.splitlines():
        if found := SECTION.match(line):
            section = found[1]
        elif (row := ROW.match(line)) and section and row[1] != OWN:
            counts[section, row[1]] += int(row[2])
    return counts


@contextmanager
def watched(job: Job) -> Iterator[None]:
    """`rdma-kv status --watch` meanwhile, which has said its first line."""
    runs = ["--runs", str(job.folder.parent)]
    command = [*RDMA_KV, "status", str(job.job_id), "--watch", *runs]
    with job.lab.popen(*command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, "status --watch ended"
            print(f"watched: {line.strip()}", file=sys.stderr)
            yield
            assert process.poll() is None, "status --watch ended"
        finally:
            process.kill()


def measure(job: Job, seconds: float) -> Counter[tuple[str, str]]:
    """RPCs while the job was watched for so long."""
    with watched(job):
        # Between two looks at the queue: a whole number of intervals has as many of them.
        time.sleep(CALM_INTERVAL_S / 2)
        before = parse(job.lab.check("sdiag"))
        time.sleep(seconds)
        return parse(job.lab.check("sdiag")) - before


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.rpcs", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="for each job (120)")
    options = parser.parse_args()
    if reason := why_not():
        print(f"no Slurm can start here: {reason}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"seconds": options.seconds}
    print("| job | by | | RPCs | an hour |\n|---|---|---|---|---|")
    with Lab({"p0": "prefill", "d0": "decode", "d1": "decode"}) as lab:
        for state in ("pending", "ready"):
            held = ["--option=--hold"] if state == "pending" else []
            job = standin.submit(lab, lab.shared / state, *held)
            if not held:
                job.wait("READY")
            counts = measure(job, options.seconds)
            per_hour = 3600 / options.seconds
            for (by, name), count in sorted(counts.items()):
                row = f"| {state} | {by} | {name} | {count} | {count * per_hour:.0f} |"
                print(row, flush=True)
            types = {name: count for (by, name), count in counts.items() if by != "user"}
            asked = sum(count for name, count in types.items() if name.startswith(COMMANDS))
            result[f"{state}_command_rpcs_per_hour"] = round(asked * per_hour, 1)
            result[f"{state}_daemon_rpcs_per_hour"] = round(
                (sum(types.values()) - asked) * per_hour, 1
            )
            lab.restore()
    print(f"RESULT {json.dumps(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
