# SPDX-License-Identifier: Apache-2.0
"""squeue's lines, as Slurm 22.05.8 printed them on the lab, and sacct's, written by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rdma_kv_cache.slurm import programs, queue
from rdma_kv_cache.slurm.programs import SlurmError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LINES = """\
46927+0|RUNNING|None|p0|1|0:05|4:55|2026-11-24T18:45:28|main|het|name
46927+1|RUNNING|None|d[0-1]|2|0:05|4:55|2026-11-24T18:45:28|main|het|name
46934_3|COMPLETED|None|d0|1|0:00|365-00:00:00|2026-11-24T18:45:29|main|wrap
46934_[0-3]|PENDING|None||1|0:00|UNLIMITED|N/A|main|wrap
46933|FAILED|NonZeroExitCode|p1|1|0:00|365-00:00:00|2026-11-24T18:45:28|main|wrap
46931|CANCELLED|PartitionNodeLimit||9|0:00|UNLIMITED|2026-11-24T18:45:36|main|wrap
46932|PENDING|BeginTime||1|0:00|UNLIMITED|2026-11-24T19:45:28|main|wrap
46929+1|PENDING|JobHeldUser||2|0:00|5:00|N/A|main|het|name
46929+0|PENDING|JobHeldUser||1|0:00|5:00|N/A|main|het|name
"""


def reply(text: str) -> tuple[list[list[str]], queue.Runner]:
    calls: list[list[str]] = []

    def run(command: Sequence[str]) -> str:
        calls.append(list(command))
        return text

    return calls, run


def test_one_query_joins_the_components() -> None:
    calls, run = reply(LINES)
    jobs = queue.query(run)
    assert len(calls) == 1
    assert calls[0][:2] == ["squeue", "--me"]
    assert sorted(jobs) == [46927, 46929, 46931, 46932, 46933]
    running = jobs[46927]
    assert running.name == "het|name"
    assert [part.nodes for part in running.components] == ["p0", "d[0-1]"]
    assert running.leader.time_left == "4:55"
    assert not running.has_ended
    held = jobs[46929]
    assert held.leader.is_waiting
    assert [(part.offset, part.reason, part.nodes, part.start) for part in held.components] == [
        (0, "JobHeldUser", "", ""),
        (1, "JobHeldUser", "", ""),
    ]
    assert jobs[46932].leader.start == "2026-11-24T19:45:28"
    assert jobs[46933].has_ended
    assert jobs[46933].leader.reason == "NonZeroExitCode"
    assert jobs[46931].leader.state == "CANCELLED"


def test_a_name_may_hold_a_newline() -> None:
    text = (
        "7|RUNNING|None|p0|1|0:05|4:55|N/A|main|one\ntwo\n8|PENDING|None||1|0:00|5:00|N/A|main|b\n"
    )
    assert [job.name for job in queue.query(reply(text)[1]).values()] == ["one", "b"]


def test_an_empty_queue_and_another_format() -> None:
    assert queue.query(reply("")[1]) == {}
    with pytest.raises(SlurmError, match="printed 'Welcome to the cluster!', not a line"):
        queue.query(reply("Welcome to the cluster!\n31|RUNNING\n")[1])


def test_accounting_tells_how_jobs_ended() -> None:
    calls, run = reply(
        "31+0|FAILED|1:0|p0|1|00:01:02|01:00:00|2026-11-24T18:00:00|main|llama\n"
        "31+1|CANCELLED by 1000|0:15|d[0-1]|2|00:01:02|01:00:00|2026-11-24T18:00:00|main|llama\n"
    )
    jobs = queue.ended([31, 30], run)
    assert "--jobs=30,31" in calls[0]
    assert [part.state for part in jobs[31].components] == ["FAILED", "CANCELLED"]
    assert jobs[31].leader.reason == "1:0"
    calls, run = reply("")
    assert queue.ended([], run) == {}
    assert calls == []


def test_programs_say_why_they_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=rf"no squeue on PATH \({tmp_path}\)"):
        programs.run(["squeue"])
    script = tmp_path / "squeue"
    script.write_text("#!/bin/sh\necho 'squeue: error: a' >&2\necho 'squeue: error: b' >&2\nexit 1")
    script.chmod(0o755)
    with pytest.raises(SlurmError, match=r"^squeue: error: b$"):
        programs.run(["squeue"])
    script.write_text("#!/bin/sh\nexit 3")
    with pytest.raises(SlurmError, match="squeue: exit code 3"):
        programs.run(["squeue"])
    script.write_text("#!/bin/sh\nexec /bin/sleep 30")
    monkeypatch.setattr(programs, "TIMEOUT_S", 0.2)
    with pytest.raises(SlurmError, match=r"did not answer within 0\.2 s"):
        programs.run(["squeue"])


def test_a_users_settings_do_not_change_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    script = tmp_path / "squeue"
    script.write_text('#!/bin/sh\necho "$SQUEUE_PARTITION,$SLURM_TIME_FORMAT"')
    script.chmod(0o755)
    assert programs.run(["squeue"]) == ",standard\n"
