# SPDX-License-Identifier: Apache-2.0
"""A batch that loses its job on the way, on a real Slurm with stand-in engines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from rdma_kv_cache.slurm import records
from tests.cluster.conftest import STANDIN, python_path
from tests.slurm import Lab, why_not
from tests.slurm.machine import poll
from tests.slurm.standin import RDMA_KV

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

PROMPTS = 3000
CONCURRENCY = 8
LIMIT_S = 90.0
JOB = {
    "model": {"name": "org/model", "max_model_len": 128},
    "prefill": {"engines": 1, "constraint": "prefill"},
    "decode": {"engines": 1, "constraint": "decode"},
    "slurm": {"time": "10", "signal_s": 60},
}


@pytest.fixture
def place(lab: Lab, request: pytest.FixtureRequest) -> Path:
    return make_place(lab, request.node.name.replace("[", "-").strip("]"))


def make_place(lab: Lab, name: str) -> Path:
    """A folder that all nodes see, with job file and prompts."""
    folder = lab.shared / name
    folder.mkdir()
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    with (folder / "in.jsonl").open("w") as file:
        for index in range(PROMPTS):
            body = {"model": "org/model", "prompt": [1, index], "max_tokens": 2}
            line = {"custom_id": str(index), "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")
    return folder


def submit(lab: Lab, place: Path, *options: str) -> records.Record:
    """`rdma-kv submit batch` there."""
    said = lab.check(
        *RDMA_KV, "submit", "batch", "in.jsonl", "-o", "out.jsonl", "--config", "job.yaml",
        "--runs", "runs", "--json", "--no-model-check",
        "--concurrency", str(CONCURRENCY), *options,
        cwd=place,
        env={
            "HOME": str(place),
            "PYTHONPATH": python_path(STANDIN),
            "STANDIN_ASKED": str(place / "asked.jsonl"),
            "STANDIN_ANSWER_S": "0.02",  # so that an event finds requests in flight
        },
    )  # fmt: skip
    record = records.read(Path(json.loads(said)["folder"]))
    assert record is not None
    return record


def successor_of(record: records.Record) -> records.Record | None:
    """The job that names this one as its predecessor."""
    jobs = records.read_all(record.path.parent)
    return next((job for job in jobs if job.predecessor == record.job_id), None)


def lines_done(place: Path) -> int:
    progress = place / "out.jsonl.progress.jsonl"
    return len(progress.read_bytes().splitlines()) if progress.exists() else 0


def warn_of_the_time_limit(lab: Lab, job: int) -> None:
    lab.check("scancel", "--batch", "--signal=USR1", str(job))


def kill(lab: Lab, job: int) -> None:
    """All processes at once: nothing that is in flight is answered."""
    lab.check("scancel", "--signal=KILL", str(job))


def lose_the_decode_node(lab: Lab, job: int) -> None:
    node = next(n for n in lab.nodes if n.startswith("d") and is_allocated(lab, n))
    lab.check("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def is_allocated(lab: Lab, node: str) -> bool:
    return lab.check("sinfo", "-h", "-n", node, "-o", "%t").strip() in ("alloc", "mix")


def preempt(lab: Lab, _job: int) -> None:
    """A short job of a better partition wants all nodes."""
    lab.submit(
        "--partition=high", f"--nodes={len(lab.nodes)}", "--exclusive", "--wrap=sleep 3",
        "--output=/dev/null",
    )  # fmt: skip


@pytest.mark.parametrize("event", [warn_of_the_time_limit, kill, lose_the_decode_node])
def test_successor_does_the_rest(lab: Lab, place: Path, event: Callable[[Lab, int], None]) -> None:
    expect_successor(lab, place, event)


def test_preempted_batch_goes_on() -> None:
    if reason := why_not():
        pytest.skip(reason)
    settings = {"PreemptType": "preempt/partition_prio", "PreemptMode": "CANCEL"}
    partitions = ["low Default=YES PriorityTier=1", "high PriorityTier=2"]
    with Lab({"p0": "prefill", "d0": "decode"}, settings=settings, partitions=partitions) as lab:
        expect_successor(lab, make_place(lab, "preempted"), preempt)


def expect_successor(lab: Lab, place: Path, event: Callable[[Lab, int], None]) -> None:
    """The event ends the first job; the second one completes the file."""
    first = submit(lab, place, "--chain", "1")
    assert poll(lambda: lines_done(place) > 100, LIMIT_S)
    second = successor_of(first)
    assert second is not None
    assert "PENDING" in lab.states(second.job_id).values()
    event(lab, first.job_id)
    lab.wait_for(first.job_id, "FAILED", "NODE_FAIL", "CANCELLED", "PREEMPTED", timeout_s=LIMIT_S)
    done = lines_done(place)
    assert done < PROMPTS
    # Also before the second one has an answer of its own.
    seen = batch_of(lab, second)
    assert seen["total"] == PROMPTS
    assert seen["answered"] >= batch_of(lab, first)["answered"] > 0
    expect_completed(lab, place, second)
    seen = batch_of(lab, second)
    assert (seen["answered"], seen["failed"]) == (PROMPTS, 0)
    assert seen["per_minute"] > 0
    expect_little_asked_twice(place, interruptions=1)


def batch_of(lab: Lab, job: records.Record) -> dict[str, Any]:
    """What `rdma-kv status` says of the job's batch."""
    runs = ["--runs", str(job.path.parent)]
    said = lab.check(*RDMA_KV, "status", str(job.job_id), "--json", *runs)
    batch: dict[str, Any] = json.loads(said)["batch"]
    return batch


def expect_completed(lab: Lab, place: Path, job: records.Record) -> None:
    """Every answer exactly once."""
    states = lab.wait_for(job.job_id, "COMPLETED", "FAILED", timeout_s=LIMIT_S)
    output = job.path.with_name(f"{job.name}-{job.job_id}.out").read_text()
    assert set(states.values()) == {"COMPLETED"}, output
    answers = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [str(i) for i in range(PROMPTS)]
    assert all(answer["error"] is None for answer in answers)


def expect_little_asked_twice(place: Path, interruptions: int) -> None:
    """An interruption costs no more than what was in flight, by what the decode engines saw."""
    prompts = [json.loads(line) for line in (place / "asked.jsonl").read_text().splitlines()]
    # Probes are texts.
    asked = Counter(prompt[1] for prompt in prompts if isinstance(prompt, list))
    again = asked.total() - len(asked)
    print(f"{interruptions} interrupted: {again} of {PROMPTS} prompts asked again")
    assert len(asked) == PROMPTS
    assert again <= CONCURRENCY * interruptions


def test_another_job_continues_with_other_nodes(lab: Lab, place: Path) -> None:
    first = submit(lab, place)
    assert poll(lambda: lines_done(place) > 100, LIMIT_S)
    warn_of_the_time_limit(lab, first.job_id)
    lab.wait_for(first.job_id, "FAILED", timeout_s=LIMIT_S)
    done = lines_done(place)
    second = submit(lab, place, "--set", "decode.engines=2", "--set", "decode.nodes=2")
    assert poll(lambda: lines_done(place) > done, LIMIT_S)
    assert len(lab.states(second.job_id)) == 2
    expect_completed(lab, place, second)
    expect_little_asked_twice(place, interruptions=1)


def test_successor_is_dropped_when_all_is_done(lab: Lab, place: Path) -> None:
    first = submit(lab, place, "--chain", "1")
    lab.wait_for(first.job_id, "COMPLETED", timeout_s=LIMIT_S)
    second = successor_of(first)
    assert second is not None
    lab.wait_for(second.job_id, "CANCELLED")
