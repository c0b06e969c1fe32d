# SPDX-License-Identifier: Apache-2.0
"""A run that is killed or stopped continues where it was; nothing is lost, nothing twice."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from batch_case import request_line
from openai_peer import OpenAIPeer, answer_well

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web
    from batch_case import Batch

LINES = 40


async def slowly(body: dict[str, Any], attempt: int) -> web.StreamResponse:
    await asyncio.sleep(0.05)
    return await answer_well(body, attempt)


@pytest.fixture
def peer() -> Iterator[OpenAIPeer]:
    with OpenAIPeer(slowly) as peer:
        yield peer


def start(batch: Batch, url: str, *options: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rdma_kv_cache.cli", *batch.command(url, *options)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


def wait_for_lines(batch: Batch, count: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if batch.progress.exists() and batch.progress.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.01)
    raise AssertionError(f"fewer than {count} lines of progress")


def test_kill_in_the_middle_then_continue(batch: Batch, peer: OpenAIPeer) -> None:
    batch.write(*(request_line(str(n)) for n in range(LINES)))
    process = start(batch, peer.url, "--concurrency", "4")
    wait_for_lines(batch, 10)
    process.kill()
    process.communicate(timeout=10)
    assert not batch.out.exists()
    done = [json.loads(line)["line"] for line in batch.progress.read_bytes().splitlines()[1:]]
    assert 10 <= len(done) < LINES

    result = batch.run(peer.url, "--concurrency", "4")
    assert result.exit_code == 0, result.output
    assert f"Continuing: {len(done)} of {LINES}" in result.output
    assert f"{len(done)} from an earlier run" in " ".join(result.output.split())
    assert [answer["custom_id"] for answer in batch.answers()] == [str(n) for n in range(LINES)]
    assert all(peer.asked[str(line - 1)] == 1 for line in done)
    assert sum(peer.asked.values()) <= LINES + 4
    assert sorted(path.name for path in batch.folder.iterdir()) == [
        "answers.jsonl",
        "prompts.jsonl",
    ]


@pytest.mark.parametrize("tail", [b'{"line": 7, "ok": tr', b"\0" * 500, b"\n{}\n", b"\xff\n"])
def test_a_torn_tail_is_cut_off(batch: Batch, peer: OpenAIPeer, tail: bytes) -> None:
    batch.write(*(request_line(str(n)) for n in range(LINES)))
    process = start(batch, peer.url, "--concurrency", "4")
    wait_for_lines(batch, 5)
    process.kill()
    process.communicate(timeout=10)
    with batch.progress.open("ab") as file:
        file.write(tail)
    result = batch.run(peer.url)
    assert result.exit_code == 0, result.output
    assert f"Ignored {len(tail)} bytes" in result.output
    assert [answer["custom_id"] for answer in batch.answers()] == [str(n) for n in range(LINES)]


@pytest.mark.parametrize("head", [b"", b'{"type": "rdma-kv ba'])
def test_a_progress_file_killed_at_birth_is_begun_anew(
    batch: Batch, peer: OpenAIPeer, head: bytes
) -> None:
    batch.write(request_line("a"))
    batch.progress.write_bytes(head)
    assert batch.run(peer.url).exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_what_is_in_flight(
    batch: Batch, peer: OpenAIPeer, number: signal.Signals
) -> None:
    batch.write(*(request_line(str(n)) for n in range(LINES)))
    process = start(batch, peer.url, "--concurrency", "2")
    wait_for_lines(batch, 6)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}" in output
    assert "run the same command to continue" in output
    assert "Traceback" not in output
    asked = sum(peer.asked.values())
    assert batch.progress.read_bytes().count(b"\n") == 1 + asked
    assert batch.run(peer.url).exit_code == 0
    assert sum(peer.asked.values()) == LINES


def test_a_signal_abandons_a_request_that_does_not_end(batch: Batch, peer: OpenAIPeer) -> None:
    async def second_hangs(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        await asyncio.sleep(0 if body["prompt"] == "0" else 60)
        return await answer_well(body, attempt)

    peer.answer = second_hangs
    batch.write(*(request_line(str(n)) for n in range(3)))
    process = start(batch, peer.url, "--drain-timeout", "0.5")
    wait_for_lines(batch, 1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 143
    assert time.monotonic() - began < 5
    assert "1 of 3 lines are done" in output


def test_a_second_signal_does_not_wait(batch: Batch, peer: OpenAIPeer) -> None:
    async def hang(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        await asyncio.sleep(60)
        return await answer_well(body, attempt)

    peer.answer = hang
    batch.write(request_line("a"))
    process = start(batch, peer.url, "--drain-timeout", "50")
    wait_for_lines(batch, 0)
    while not peer.in_flight:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_a_full_disk_stops_the_run_and_it_can_go_on(batch: Batch, peer: OpenAIPeer) -> None:
    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

    batch.write(*(request_line(str(n)) for n in range(LINES)))
    process = start(batch, peer.url, preexec_fn=limit_file_size)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 3, output
    assert "File too large" in output
    assert "Traceback" not in output
    assert not batch.out.exists()
    result = batch.run(peer.url)
    assert result.exit_code == 0, result.output
    assert len(batch.answers()) == LINES


def stopped_run(batch: Batch, peer: OpenAIPeer) -> None:
    """Leave a progress file behind."""
    batch.write(*(request_line(str(n)) for n in range(LINES)))
    process = start(batch, peer.url, "--concurrency", "2")
    wait_for_lines(batch, 3)
    process.kill()
    process.communicate(timeout=10)


def test_other_prompts_are_refused_until_restart(batch: Batch, peer: OpenAIPeer) -> None:
    stopped_run(batch, peer)
    batch.write(request_line("other"))
    result = batch.run(peer.url)
    assert result.exit_code == 2
    assert "other prompts" in result.output
    assert "--restart" in result.output
    assert batch.run(peer.url, "--restart").exit_code == 0
    assert [answer["custom_id"] for answer in batch.answers()] == ["other"]


def test_another_model_is_refused(batch: Batch, peer: OpenAIPeer) -> None:
    stopped_run(batch, peer)
    result = batch.run(peer.url, "--model", "another")
    assert result.exit_code == 2
    assert "model 'small-model', this run uses 'another'" in result.output
    assert batch.run(peer.url, "--model", "another", "--no-resume").exit_code == 0


def test_a_file_that_is_no_progress_file_is_left_alone(batch: Batch, peer: OpenAIPeer) -> None:
    batch.write(request_line("a"))
    batch.progress.write_text("my notes\n")
    result = batch.run(peer.url)
    assert result.exit_code == 2
    assert "is not a progress file" in result.output
    assert batch.progress.read_text() == "my notes\n"


def test_two_runs_cannot_write_one_output(batch: Batch, peer: OpenAIPeer) -> None:
    batch.write(*(request_line(str(n)) for n in range(LINES)))
    process = start(batch, peer.url, "--concurrency", "1")
    try:
        wait_for_lines(batch, 2)
        result = batch.run(peer.url, "--restart")
        assert result.exit_code == 2
        assert "another run is writing" in result.output
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
    assert len(batch.answers()) == LINES
