# SPDX-License-Identifier: Apache-2.0
"""What the client does when the server is busy, broken or gone."""

from __future__ import annotations

import asyncio
import email.utils
import socket
import time
from typing import TYPE_CHECKING, Any

from aiohttp import web
from batch_case import request_line
from openai_peer import OpenAIPeer, answer_well
from rich.console import Console

from rdma_kv_cache.batch import BatchOptions, run_batch, scan

if TYPE_CHECKING:
    import pytest
    from batch_case import Batch


def failing(times: int, status: int, **headers: str) -> Any:
    """An answer that is `status` for the first `times` attempts of each prompt."""

    async def answer(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        if attempt > times:
            return await answer_well(body, attempt)
        return web.json_response({"error": {"message": "no"}}, status=status, headers=headers)

    return answer


def test_retry_after_is_obeyed(batch: Batch) -> None:
    batch.write(request_line("a"))
    with OpenAIPeer(failing(1, 429, **{"Retry-After": "1"})) as peer:
        began = time.monotonic()
        assert batch.run(peer.url).exit_code == 0
        assert time.monotonic() - began >= 1.0
        assert peer.asked["a"] == 2


def test_retry_after_may_be_a_date(batch: Batch) -> None:
    batch.write(request_line("a"))
    date = email.utils.formatdate(time.time() - 5, usegmt=True)
    with OpenAIPeer(failing(2, 503, **{"Retry-After": date})) as peer:
        assert batch.run(peer.url).exit_code == 0
        assert peer.asked["a"] == 3


def test_a_refused_request_is_not_retried(batch: Batch) -> None:
    async def too_long(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        if body["prompt"] != "long":
            return await answer_well(body, attempt)
        message = "maximum context length is 2048 tokens, the prompt has 9000"
        return web.json_response({"error": {"message": message, "code": 400}}, status=400)

    batch.write(request_line("long"), request_line("short"))
    with OpenAIPeer(too_long) as peer:
        assert batch.run(peer.url).exit_code == 1
        assert peer.asked["long"] == 1
    refused, answered = batch.answers()
    assert refused["response"]["status_code"] == 400
    assert "2048 tokens" in refused["response"]["body"]["error"]["message"]
    assert refused["error"] is None
    assert answered["response"]["status_code"] == 200
    assert not batch.progress.exists()


def test_a_body_that_is_no_json_is_kept_as_text(batch: Batch) -> None:
    async def text(_body: dict[str, Any], _attempt: int) -> web.StreamResponse:
        return web.Response(text="<html>", status=403)

    batch.write(request_line("a"))
    with OpenAIPeer(text) as peer:
        assert batch.run(peer.url).exit_code == 1
    assert batch.answers()[0]["response"]["body"] == "<html>"


def test_what_still_fails_at_the_deadline_is_tried_again_by_the_next_run(batch: Batch) -> None:
    async def b_fails(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        if body["prompt"] == "b":
            return web.json_response({"error": "starting"}, status=503)
        return await answer_well(body, attempt)

    batch.write(request_line("a"), request_line("b"))
    with OpenAIPeer(b_fails) as peer:
        result = batch.run(peer.url, "--retry-deadline", "1")
        assert result.exit_code == 1
        assert "1 of them failed for a reason that may pass" in result.output
        assert batch.answers()[1]["response"]["status_code"] == 503
        peer.answer = answer_well
        result = batch.run(peer.url)
        assert result.exit_code == 0, result.output
        assert peer.asked["a"] == 1
    assert [answer["response"]["status_code"] for answer in batch.answers()] == [200, 200]
    assert not batch.progress.exists()


def test_a_dropped_connection_is_retried(batch: Batch) -> None:
    async def drop_first(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        if attempt > 1:
            return await answer_well(body, attempt)
        raise asyncio.CancelledError  # aiohttp then closes the connection without an answer

    async def cut_short(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        if attempt > 1:
            return await answer_well(body, attempt)
        return web.Response(text="not json")

    batch.write(request_line("a"))
    for answer in (drop_first, cut_short):
        with OpenAIPeer(answer) as peer:
            result = batch.run(peer.url)
            assert result.exit_code == 0, result.output
            assert peer.asked["a"] == 2


def test_one_request_without_answer_is_an_error_line(batch: Batch) -> None:
    async def a_hangs(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        await asyncio.sleep(30 if body["prompt"] == "a" else 0.2)
        return await answer_well(body, attempt)

    batch.write(request_line("a"), *(request_line(f"b{n}") for n in range(30)))
    with OpenAIPeer(a_hangs) as peer:
        options = ("--request-timeout", "1", "--retry-deadline", "1", "--concurrency", "2")
        result = batch.run(peer.url, *options)
    assert result.exit_code == 1, result.output
    error = batch.answers()[0]["error"]
    assert error["code"] == "no_answer"
    assert "request timeout" in error["message"]
    assert sum(answer["error"] is None for answer in batch.answers()) == 30


def test_a_server_that_goes_away_stops_the_run_and_it_can_go_on(batch: Batch) -> None:
    async def vanish(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        if body["prompt"] in "0123":
            return await answer_well(body, attempt)
        await asyncio.sleep(30)
        return await answer_well(body, attempt)

    batch.write(*(request_line(str(n)) for n in range(10)))
    with OpenAIPeer(vanish) as peer:
        options = ("--request-timeout", "0.5", "--retry-deadline", "1", "--concurrency", "1")
        result = batch.run(peer.url, *options)
        assert result.exit_code == 3, result.output
        assert "has not answered" in result.output
        assert "4 of 10 lines are done; run the same command to continue" in result.output
        assert not batch.out.exists()
        peer.answer = answer_well
        assert batch.run(peer.url).exit_code == 0
        assert peer.asked["0"] == 1
    assert len(batch.answers()) == 10


def test_a_server_known_to_be_gone_is_not_waited_for(batch: Batch) -> None:
    batch.write(request_line("a"))
    with OpenAIPeer(failing(99, 503)) as peer:
        options = BatchOptions(
            prompts=batch.prompts,
            out=batch.out,
            url=peer.url,
            why_gone=lambda: "the run has ended",
        )
        result = asyncio.run(run_batch(options, scan(batch.prompts), Console(quiet=True)))
        assert peer.asked["a"] == 1
    assert result.stopped == "the run has ended"
    assert result.failed == 0


def test_concurrency_is_bounded_and_used(batch: Batch) -> None:
    async def slow(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return await answer_well(body, attempt)

    batch.write(*(request_line(str(n)) for n in range(40)))
    with OpenAIPeer(slow) as peer:
        assert batch.run(peer.url, "--concurrency", "5").exit_code == 0
        assert peer.most_in_flight == 5


def test_a_url_where_nothing_listens(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdma_kv_cache.batch.client.FIRST_CONTACT_S", 0.5)
    batch.write(request_line("a"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        result = batch.run(f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert result.exit_code == 2
    assert "Is the server up and the URL right?" in result.output
    assert "Traceback" not in result.output


def test_the_key_is_sent(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file = batch.folder / "api.key"
    key_file.write_text("secret-1\n")
    batch.write(request_line("a"))
    with OpenAIPeer() as peer:
        assert batch.run(peer.url, "--api-key-file", str(key_file)).exit_code == 0
        assert peer.authorizations == {"Bearer secret-1"}
        peer.authorizations.clear()
        monkeypatch.setenv("RDMA_KV_API_KEY", "secret-2")
        assert batch.run(peer.url).exit_code == 0
        assert peer.authorizations == {"Bearer secret-2"}
