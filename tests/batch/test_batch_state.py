# SPDX-License-Identifier: Apache-2.0
"""The state file of a run: how far it is, what earlier runs did included."""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, Any

from aiohttp import web
from batch_case import request_line
from openai_peer import OpenAIPeer, answer_well
from rich.console import Console

from rdma_kv_cache.batch import BatchOptions, run_batch, scan
from rdma_kv_cache.batch.state import BatchState, read_state, write_state

if TYPE_CHECKING:
    from pathlib import Path

    from batch_case import Batch

LINES = 20


async def fail(_body: dict[str, Any], _attempt: int) -> web.StreamResponse:
    return web.json_response({"error": "no"}, status=400)


def run(batch: Batch, peer: OpenAIPeer, state_file: Path) -> None:
    """The whole batch, one request at a time."""
    options = BatchOptions(batch.prompts, batch.out, peer.url, concurrency=1, state_file=state_file)
    asyncio.run(run_batch(options, scan(batch.prompts), Console(file=io.StringIO())))


def test_it_follows_a_run(batch: Batch) -> None:
    """The last line is answered only when the file tells of all lines before it."""
    state_file = batch.folder / "batch.json"
    seen: list[BatchState] = []

    async def answer(body: dict[str, Any], attempt: int) -> web.StreamResponse:
        if body["prompt"] == "0":
            return await fail(body, attempt)
        while body["prompt"] == str(LINES - 1) and not seen:
            state = read_state(state_file)
            seen.extend([state] if state.done == LINES - 1 else [])
            await asyncio.sleep(0.05)
        return await answer_well(body, attempt)

    batch.write(*(request_line(str(n)) for n in range(LINES)))
    with OpenAIPeer(answer) as peer:
        run(batch, peer, state_file)
    (state,) = seen
    assert (state.total, state.answered, state.failed, state.done_before) == (20, 18, 1, 0)
    assert state.remaining_s is not None
    assert 0 < state.remaining_s < 60
    state = read_state(state_file)
    assert (state.answered, state.failed, state.remaining_s) == (19, 1, 0)


def test_it_counts_what_an_earlier_run_did(batch: Batch) -> None:
    batch.write(*(request_line(str(n)) for n in range(LINES)))
    with OpenAIPeer() as peer:

        async def lose_the_rest(body: dict[str, Any], attempt: int) -> web.StreamResponse:
            # A reason that may pass: the next run asks those again.
            is_lost = int(body["prompt"]) >= 5
            return web.Response(status=503) if is_lost else await answer_well(body, attempt)

        peer.answer = lose_the_rest
        assert batch.run(peer.url, "--retry-deadline", "0.01").exit_code == 1
        peer.answer = answer_well
        state_file = batch.folder / "batch.json"
        run(batch, peer, state_file)
    state = read_state(state_file)
    assert (state.total, state.answered, state.failed, state.done_before) == (20, 20, 0, 5)
    assert state.per_minute is not None
    assert abs(state.per_minute * state.seconds / 60 - 15) < 1e-6


def test_a_rate_needs_a_result_of_this_run() -> None:
    state = BatchState(total=100, answered=40, failed=10, done_before=50, seconds=0.0)
    assert state.per_minute is None
    assert state.remaining_s is None
    state = BatchState(total=100, answered=60, failed=10, done_before=50, seconds=10.0)
    assert state.per_minute == 120
    assert state.remaining_s == 15


def test_a_folder_that_cannot_be_written_stops_nothing(batch: Batch) -> None:
    write_state(batch.folder / "missing" / "batch.json", BatchState(1, 1, 0, 0, 1.0))
    batch.write(request_line("a"))
    with OpenAIPeer() as peer:
        run(batch, peer, batch.folder / "missing" / "batch.json")
    assert len(batch.answers()) == 1
