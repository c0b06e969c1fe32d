# SPDX-License-Identifier: Apache-2.0
"""The one state that comes of Slurm's word, the state file and the service's answer."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from rdma_kv_cache.cluster.run_dir import RunState
from rdma_kv_cache.slurm.queue import Component, QueuedJob
from rdma_kv_cache.watch.folders import Reading
from rdma_kv_cache.watch.probe import Answer
from rdma_kv_cache.watch.state import Facts, judge, lost_components, ssh_line
from tests.watch.conftest import ready

ANSWERS_READY = Answer(ready=True, state="READY")
REFUSES = Answer(error="http://p0:1: Connection refused", refused=True)
SILENT = Answer(error="http://p0:1 does not answer")


def queued(*states: str, reason: str = "", start: str = "") -> QueuedJob:
    components = [
        Component(offset, state, reason, f"n{offset}", 1, start=start)
        for offset, state in enumerate(states)
    ]
    return QueuedJob(7, "serve", tuple(components))


def facts(slurm: QueuedJob | None = None, run: RunState | None = None, **changes: Any) -> Facts:
    reading = Reading(run, time.time() if run else 0.0)
    return Facts(
        **{"kind": "serve", "is_slurm": True, "reading": reading, "queued": slurm, **changes}
    )


RUNNING = queued("RUNNING", "RUNNING")
DONE = RunState("DONE", "stopped")
LOST = RunState("FAILED", "serving", "no decode engine is left")


@pytest.mark.parametrize(
    ("case", "state", "words"),
    [
        # Waiting
        (facts(queued("PENDING", "PENDING", reason="Resources")), "PENDING", "Resources"),
        (
            facts(queued("PENDING", reason="Priority", start="2026-11-24T20:00:00")),
            "PENDING",
            "Priority, expected to start 2026-11-24 20:00:00",
        ),
        (facts(queued("PENDING", reason="PartitionTimeLimit")), "PENDING", "lower slurm.time"),
        (facts(queued("PENDING")), "PENDING", "not considered yet"),
        (facts(queued("PENDING"), ready(), answer=REFUSES), "PENDING", "not considered yet"),
        (facts(queued("PENDING"), ready(), answer=Answer(ready=True)), "PENDING", "not considered"),
        (
            facts(queued("PENDING", start="2099-01-01T00:00:00"), ready(), answer=ANSWERS_READY),
            "READY",
            "",
        ),
        # Starting
        (facts(queued("CONFIGURING", "CONFIGURING")), "STARTING", "Slurm prepares"),
        (facts(RUNNING), "STARTING", "the batch script starts"),
        (facts(RUNNING, RunState("STARTING", "the engines connect")), "STARTING", "connect"),
        (
            facts(RUNNING, ready(), answer=Answer(reason="no decode", state="STARTING")),
            "STARTING",
            "no decode",
        ),
        (
            facts(RUNNING, ready(), answer=Answer(reason="decode-0 restarts", state="READY")),
            "STARTING",
            "decode-0 restarts",
        ),
        # Ready: the service's word, or the file's where the service cannot be reached
        (facts(RUNNING, ready(), answer=ANSWERS_READY), "READY", ""),
        (facts(RUNNING, RunState("STARTING", "late"), answer=ANSWERS_READY), "READY", ""),
        (facts(RUNNING, ready(), answer=SILENT), "READY", ""),
        (facts(RUNNING, ready()), "READY", ""),
        # Ending
        (facts(RUNNING, RunState("DRAINING", "3 requests")), "DRAINING", "3 requests"),
        (facts(RUNNING, ready(), answer=REFUSES), "DRAINING", "nothing listens any more"),
        (facts(RUNNING, DONE), "DRAINING", "the job ends"),
        (facts(RUNNING, LOST), "FAILED", "no decode engine is left"),
        # Ended
        (facts(queued("COMPLETED", "COMPLETED"), DONE), "DONE", ""),
        (facts(queued("COMPLETED")), "DONE", ""),
        (facts(queued("CANCELLED"), DONE), "DONE", ""),
        (facts(queued("TIMEOUT"), DONE), "DONE", ""),
        (facts(queued("TIMEOUT"), DONE, kind="batch"), "FAILED", "TIMEOUT: .*submit it again"),
        (facts(queued("COMPLETED"), DONE, kind="batch"), "DONE", ""),
        (facts(queued("FAILED", reason="1:0"), DONE, kind="batch"), "FAILED", "exit code 1:0"),
        (facts(queued("FAILED"), DONE, kind=""), "FAILED", "ended with an error"),
        (facts(queued("CANCELLED"), ready()), "FAILED", "CANCELLED: it was cancelled"),
        (facts(queued("NODE_FAIL"), ready()), "FAILED", "a node was lost"),
        (facts(queued("NODE_FAIL"), DONE), "FAILED", "a node was lost"),
        (facts(queued("PREEMPTED")), "FAILED", "preempted"),
        (facts(queued("FAILED"), LOST), "FAILED", "no decode engine is left"),
        # Slurm has forgotten it, or was not asked
        (facts(None, DONE), "DONE", ""),
        (facts(None, LOST), "FAILED", "no decode engine is left"),
        (facts(None, ready(), answer=SILENT), "FAILED", "ended while READY"),
        (facts(None, ready(), answer=ANSWERS_READY), "READY", ""),
        (facts(None), "FAILED", "Slurm does not know it"),
        (facts(None, queue_error="no squeue on PATH"), "PENDING", "not known: no squeue on PATH"),
        (facts(None, ready(), queue_error="no squeue"), "READY", ""),
        # Without Slurm
        (facts(None, None, is_slurm=False), "STARTING", "the ranks start"),
        (facts(None, ready(), is_slurm=False, answer=ANSWERS_READY), "READY", ""),
        (facts(None, ready(pid=5), is_slurm=False, is_process_gone=True), "FAILED", "has died"),
        (facts(None, DONE, is_slurm=False, is_process_gone=True), "DONE", ""),
    ],
)
def test_state(case: Facts, state: str, words: str) -> None:
    found, detail = judge(case)
    assert found == state, detail
    assert re.search(words, detail) if words else not detail


def test_a_state_file_of_an_earlier_attempt_does_not_count() -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    requeued = queued("RUNNING", start=now)
    old = Reading(LOST, time.time() - 120)
    assert judge(Facts("serve", True, old, requeued)) == ("STARTING", "the batch script starts")
    # Clocks of a cluster differ by seconds: this one is of the present attempt.
    recent = Reading(LOST, time.time() - 20)
    assert judge(Facts("serve", True, recent, requeued))[0] == "FAILED"


def test_a_lost_component_is_told_while_the_leader_runs() -> None:
    (note,) = lost_components(queued("RUNNING", "CANCELLED"))
    assert "component 1 (n1) is CANCELLED" in note
    assert lost_components(queued("CANCELLED", "CANCELLED")) == []
    assert lost_components(None) == []


@pytest.mark.parametrize(
    ("url", "host", "line"),
    [
        ("http://10.0.0.5:8000", "p0", "ssh -N -L 8000:10.0.0.5:8000 me@login"),
        ("http://p0.hpc:8000", "p0", "ssh -N -L 8000:p0.hpc:8000 me@login"),
        ("http://[fd00::5]:80", "p0", "ssh -N -L '80:[fd00::5]:80' me@login"),
        ("http://127.0.0.1:8000", "p0", "ssh -N -J me@login -L 8000:localhost:8000 me@p0"),
        ("http://127.0.0.1:8000", "login", "ssh -N -L 8000:localhost:8000 me@login"),
        ("", "p0", ""),
    ],
)
def test_ssh_line(url: str, host: str, line: str) -> None:
    assert ssh_line(url, host, "me", "login") == line
