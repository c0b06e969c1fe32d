# SPDX-License-Identifier: Apache-2.0
"""What goes in and what comes out, line by line."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from batch_case import request_line
from openai_peer import MODEL, OpenAIPeer

from rdma_kv_cache.batch import lines as lines_module

if TYPE_CHECKING:
    from pathlib import Path

    from batch_case import Batch


def test_answers_stand_in_the_order_of_the_input(batch: Batch) -> None:
    async def last_first(body: dict[str, Any], _attempt: int) -> web.StreamResponse:
        await asyncio.sleep((9 - int(body["prompt"])) * 0.03)
        return web.json_response({"text": body["prompt"]})

    batch.write(*(request_line(str(n)) for n in range(10)))
    with OpenAIPeer(last_first) as peer:
        result = batch.run(peer.url)
    assert result.exit_code == 0, result.output
    answers = batch.answers()
    assert [answer["custom_id"] for answer in answers] == [str(n) for n in range(10)]
    assert [answer["response"]["body"]["text"] for answer in answers] == [str(n) for n in range(10)]
    assert not batch.progress.exists()


def test_shape_of_an_answer_line(batch: Batch) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": "theirs"}
    batch.write(request_line("a"), request_line("b", url="/v1/chat/completions", body=chat))
    with OpenAIPeer() as peer:
        assert batch.run(peer.url + "/v1/").exit_code == 0
    first, second = batch.answers()
    assert set(first) == {"id", "custom_id", "response", "error"}
    assert first["response"]["status_code"] == 200
    assert first["response"]["request_id"] == "id-a"
    assert first["response"]["body"]["choices"][0]["text"] == "answer to a"
    assert first["error"] is None
    assert second["response"]["body"]["model"] == "theirs"
    assert first["id"] != second["id"]


@pytest.mark.parametrize(
    ("line", "code", "custom_id", "words"),
    [
        ('{"custom_id": "x", ', "invalid_json", None, "not valid JSON"),
        (b'{"custom_id": "\xff"}', "invalid_json", None, "not UTF-8"),
        ("[" * 100_000, "invalid_json", None, "deep"),
        ('{"custom_id": "x", "body": NaN}', "invalid_json", None, "NaN"),
        ("[1, 2]", "invalid_line", None, "expected a JSON object, got a list"),
        ('{"method": "POST"}', "missing_field", None, "custom_id is missing"),
        (request_line("x", custom_id=7), "invalid_custom_id", None, "a string, not a number"),
        (request_line("x", custom_id=""), "invalid_custom_id", "", "0 characters"),
        (request_line("x", method="GET"), "invalid_method", "x", "'GET'"),
        (request_line("x", url="/v1/embeddings"), "invalid_url", "x", "/v1/chat/completions"),
        ('{"custom_id": "x", "method": "POST"}', "missing_field", "x", "url is missing"),
        (request_line("x", body="hi"), "invalid_body", "x", "an object, not a string"),
        (request_line("x", body={"stream": True}), "invalid_body", "x", "cannot stream"),
    ],
)
def test_a_wrong_line_becomes_an_error_line(
    batch: Batch, line: dict[str, Any] | str | bytes, code: str, custom_id: str | None, words: str
) -> None:
    batch.write(request_line("before"), line, request_line("after"))
    with OpenAIPeer() as peer:
        result = batch.run(peer.url)
    assert result.exit_code == 1, result.output
    assert "1 of 3 lines are errors" in result.output
    before, wrong, after = batch.answers()
    assert before["response"]["status_code"] == after["response"]["status_code"] == 200
    assert wrong["response"] is None
    assert wrong["error"]["code"] == code
    assert wrong["error"]["line"] == 2
    assert words in wrong["error"]["message"]
    assert (
        wrong["custom_id"] in (custom_id, None)
        if custom_id == ""
        else custom_id == wrong["custom_id"]
    )


def test_a_duplicate_custom_id_names_the_first_line(batch: Batch) -> None:
    batch.write(request_line("a"), "", request_line("a"), request_line("b"))
    with OpenAIPeer() as peer:
        assert batch.run(peer.url).exit_code == 1
        assert peer.asked["a"] == 1
    first, duplicate, _ = batch.answers()
    assert first["error"] is None
    assert duplicate["error"]["code"] == "duplicate_custom_id"
    assert duplicate["error"]["line"] == 3
    assert "line 1" in duplicate["error"]["message"]


def test_a_line_that_is_too_long_is_skipped_whole(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 1000)
    batch.write(request_line("x" * 5000), request_line("short"))
    with OpenAIPeer() as peer:
        assert batch.run(peer.url).exit_code == 1
    long, short = batch.answers()
    assert long["error"]["code"] == "line_too_long"
    assert short["response"]["status_code"] == 200


def test_blank_lines_and_a_byte_order_mark_are_no_lines(batch: Batch) -> None:
    batch.write(b"\xef\xbb\xbf" + json.dumps(request_line("a")).encode(), "", "  ")
    with OpenAIPeer() as peer:
        assert batch.run(peer.url).exit_code == 0
    assert len(batch.answers()) == 1


def test_gzip_in_and_out(batch: Batch) -> None:
    batch.prompts = batch.folder / "prompts.jsonl.gz"
    batch.out = batch.folder / "answers.jsonl.gz"
    batch.write(request_line("a"), request_line("b"))
    with OpenAIPeer() as peer:
        assert batch.run(peer.url).exit_code == 0
    lines = gzip.decompress(batch.out.read_bytes()).splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == ["a", "b"]


def test_lone_surrogates_survive(batch: Batch) -> None:
    batch.write('{"custom_id": "\\ud800", "method": "POST", "url": "/v1/completions",'
                ' "body": {"prompt": "\\udfff"}}')  # fmt: skip
    with OpenAIPeer() as peer:
        assert batch.run(peer.url).exit_code == 0
    assert batch.answers()[0]["custom_id"] == "\ud800"


def test_model_option_wins_over_the_lines(batch: Batch) -> None:
    batch.write(request_line("a"), request_line("b", body={"prompt": "b", "model": "theirs"}))
    with OpenAIPeer() as peer:
        assert batch.run(peer.url, "--model", "mine").exit_code == 0
        assert [body["model"] for body in peer.bodies] == ["mine", "mine"]


def test_without_a_model_the_server_chooses(batch: Batch) -> None:
    batch.write(request_line("a"))
    with OpenAIPeer() as peer:
        assert batch.run(peer.url).exit_code == 0
        assert "model" not in peer.bodies[0]
    assert batch.answers()[0]["response"]["body"]["model"] == MODEL


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read prompts: No such file"),
        (b"\n\n", "holds no prompts"),
    ],
)
def test_a_prompt_file_that_is_none(batch: Batch, content: bytes | None, words: str) -> None:
    if content is not None:
        batch.prompts.write_bytes(content)
    result = batch.run("http://127.0.0.1:9")
    assert result.exit_code == 2
    assert words in result.output
    assert not batch.out.exists()


@pytest.mark.parametrize("damage", ["truncated", "not gzip"])
def test_a_broken_gzip_file(batch: Batch, tmp_path: Path, damage: str) -> None:
    batch.prompts = tmp_path / "prompts.jsonl.gz"
    batch.write(*(request_line(str(n)) for n in range(100)))
    whole = batch.prompts.read_bytes()
    batch.prompts.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"{}\n")
    result = batch.run("http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "not a whole gzip file" in result.output


def test_the_output_may_not_be_the_input(batch: Batch) -> None:
    batch.write(request_line("a"))
    batch.out = batch.prompts
    result = batch.run("http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "prompt file itself" in result.output
