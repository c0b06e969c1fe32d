# SPDX-License-Identifier: Apache-2.0
"""What a client gets, and what engines are left with, when an engine or the client fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web
from gateway_rig import Rig, Vllm, params_of, rig, until

from rdma_kv_cache.orchestrator import dispatch

if TYPE_CHECKING:
    from pathlib import Path

Answering = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def answer(status: int, text: str) -> Answering:
    async def behave(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": text}}, status=status)

    return behave


def needs_kv(vllm: Vllm) -> Answering:
    """Answer a decode-only request; wait for KV that never comes otherwise."""

    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if params_of(body):
            return await vllm.hang(request, body)
        return await vllm.complete(request, body)

    return behave


async def drop(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
    """Break the connection as a killed engine does."""
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError


async def idle(job: Rig) -> None:
    await until(lambda: all(vllm.open == 0 for vllm in job.vllms.values()), "engines idle")


def test_client_disconnect_ends_both_legs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            for vllm in job.vllms.values():
                vllm.behave = vllm.hang
            request = asyncio.ensure_future(job.post())
            await until(lambda: all(v.open == 1 for v in job.vllms.values()), "both legs")
            request.cancel()
            await until(lambda: all(v.cancelled == 1 for v in job.vllms.values()), "both ended")
            async with job.client.get(job.url + "/metrics") as response:
                text = await response.text()
            assert 'rdma_kv_requests_total{route="/v1/completions",status="499"} 1.0' in text
            assert "rdma_kv_requests_inflight 0.0" in text

    asyncio.run(scenario())


def test_client_disconnect_in_mid_stream_ends_decode(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            decode = job.vllms["decode-0"]
            decode.behave = lambda request, _b: decode.stream(request, ["a", "b"], asyncio.Event())
            body = {"prompt": "p", "stream": True}
            async with job.client.post(job.url + "/v1/completions", json=body) as response:
                await response.content.readuntil(b"\n\n")
                response.close()
            await until(lambda: decode.cancelled == 1, "decode ended")

    asyncio.run(scenario())


def test_prefill_death_is_made_good_by_decode_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        for behave in (answer(500, "engine dead"), answer(401, "bad key"), drop):
            async with rig(tmp_path) as job:
                decode = job.vllms["decode-0"]
                decode.behave = needs_kv(decode)
                job.vllms["prefill-0"].behave = behave
                status, body = await job.post()
                assert (status, body["served_by"]) == (200, "decode-0")
                assert [bool(params_of(b)) for b in job.calls("decode-0")] == [True, False]
                await until(lambda: decode.cancelled == 1, "the leg without KV ended")  # noqa: B023

    asyncio.run(scenario())


def test_prefill_refusing_connections_is_made_good_by_another_pair(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 2, 1, health_timeout_s=30) as job:
            decode = job.vllms["decode-0"]

            async def only_from_second(
                request: web.Request, body: dict[str, Any]
            ) -> web.StreamResponse:
                if params_of(body)["remote_engine_id"] == "prefill-0":
                    return await decode.hang(request, body)
                return await decode.complete(request, body)

            decode.behave = only_from_second
            await job.vllms["prefill-0"].stop()
            answers = await asyncio.gather(*(job.post() for _ in range(6)))
            assert [status for status, _ in answers] == [200] * 6
            transfers = [params_of(body)["remote_request_id"] for body in job.calls("decode-0")]
            assert len(set(transfers)) == len(transfers)
            await idle(job)

    asyncio.run(scenario())


def test_prefill_that_hangs_is_given_up_with_its_health(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            prefill, decode = job.vllms["prefill-0"], job.vllms["decode-0"]
            decode.behave = needs_kv(decode)
            prefill.behave, prefill.healthy = prefill.hang, False
            assert (await job.post())[0] == 200
            assert job.engine_state("prefill-0") == "RESTARTING"
            await idle(job)

    asyncio.run(scenario())


def test_prefills_refusal_counts_only_if_decode_has_no_answer(
    tmp_path: Path, monkeypatch: Any
) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            prefill, decode = job.vllms["prefill-0"], job.vllms["decode-0"]
            prefill.behave = answer(400, "from prefill")
            decode_answers = asyncio.Event()

            async def later(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await decode_answers.wait()
                return await answer(400, "from decode")(request, body)

            decode.behave = later
            request = asyncio.ensure_future(job.post())
            await until(lambda: job.calls("prefill-0") and not prefill.open, "prefill refused")
            decode_answers.set()
            assert await request == (400, {"error": {"message": "from decode"}})
            monkeypatch.setattr(dispatch, "REFUSAL_GRACE_S", 0.05)
            decode.behave = decode.hang
            assert await job.post() == (400, {"error": {"message": "from prefill"}})
            await idle(job)

    asyncio.run(scenario())


def test_decode_death_before_the_first_byte_is_retried_elsewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 1, 2, policy="round_robin") as job:
            first, second = job.vllms["decode-0"], job.vllms["decode-1"]
            for behave in (drop, answer(500, "dead"), empty_stream(first)):
                first.behave = behave
                for _ in range(2):
                    status, body = await job.post()
                    assert (status, body["served_by"]) == (200, second.name)
            await idle(job)

    asyncio.run(scenario())


def empty_stream(vllm: Vllm) -> Answering:
    """Send the headers of a stream, and die before the first event."""

    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await vllm.start_stream(request)
        return await drop(request, body)

    return behave


def test_decode_that_always_fails_is_a_bounded_number_of_attempts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            job.vllms["decode-0"].behave = answer(500, "CUDA error")
            status, body = await job.post()
            assert (status, body["error"]["code"]) == (502, "engine_failure")
            assert "decode-0: HTTP 500" in body["error"]["message"]
            assert "CUDA error" in body["error"]["message"]
            assert len(job.calls("decode-0")) == 3

    asyncio.run(scenario())


def test_decode_death_in_mid_stream_ends_with_an_error_event(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            decode = job.vllms["decode-0"]

            async def die(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                response = await decode.start_stream(request)
                await response.write(b'data: {"text": "a"}\n\ndata: {"te')
                await asyncio.sleep(0.05)
                return await drop(request, body)

            decode.behave = die
            body = {"prompt": "p", "stream": True}
            async with job.client.post(job.url + "/v1/completions", json=body) as response:
                text = (await response.content.read()).decode()
            events = [event for event in text.split("\n\n") if event]
            assert events[:2] == ['data: {"text": "a"}', 'data: {"te']
            error = json.loads(events[2].removeprefix("data: "))["error"]
            assert error["code"] == "engine_failure"
            assert "decode-0" in error["message"]
            assert "[DONE]" not in text
            assert len(job.calls("decode-0")) == 1
            async with job.client.get(job.url + "/metrics") as response:
                assert "rdma_kv_broken_streams_total 1.0" in await response.text()

    asyncio.run(scenario())


def test_a_late_prefill_failure_does_not_hurt_a_stream(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            prefill, decode = job.vllms["prefill-0"], job.vllms["decode-0"]
            streaming, failed = asyncio.Event(), asyncio.Event()

            async def fail_late(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await streaming.wait()
                failed.set()
                return await drop(request, body)

            prefill.behave = fail_late
            decode.behave = lambda request, _b: decode.stream(request, ["a", "b"], failed)
            body = {"prompt": "p", "stream": True}
            async with job.client.post(job.url + "/v1/completions", json=body) as response:
                await response.content.readuntil(b"\n\n")
                streaming.set()
                assert (await response.content.read()).endswith(b"data: [DONE]\n\n")

    asyncio.run(scenario())


def test_without_prefill_engines_decode_serves_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            job.ranks["prefill-0"].state = "RESTARTING"
            await until(lambda: job.engine_state("prefill-0") == "RESTARTING", "restart seen")
            assert (await job.post())[0] == 200
            assert job.calls("prefill-0") == []
            assert await job.get("/ready") == (200, {"ready": True, "pairs": 0})

    asyncio.run(scenario())


def test_without_decode_engines_the_answer_is_503_and_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            job.ranks["decode-0"].reason = "vLLM exited with code 1"
            job.ranks["decode-0"].state = "RESTARTING"
            await until(lambda: job.engine_state("decode-0") == "RESTARTING", "restart seen")
            async with job.client.post(job.url + "/v1/completions", json={}) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0
                message = (await response.json())["error"]["message"]
            assert "decode-0 is RESTARTING (vLLM exited with code 1)" in message
            assert (await job.get("/ready"))[0] == 503
            assert (await job.get("/v1/models"))[0] == 503

    asyncio.run(scenario())


def test_a_request_ends_with_its_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, request_timeout_s=0.3) as job:
            for vllm in job.vllms.values():
                vllm.behave = vllm.hang
            status, body = await job.post()
            assert (status, body["error"]["code"]) == (504, "timeout")
            await idle(job)

    asyncio.run(scenario())


def test_an_engine_whose_rank_falls_silent_loses_its_requests(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 1, 2, policy="round_robin") as job:
            first = job.vllms["decode-0"]
            first.behave = first.hang
            requests = [asyncio.ensure_future(job.post()) for _ in range(2)]
            await until(lambda: first.open == 1, "a request at decode-0")
            job.ranks["decode-0"].beating = False
            answers = await asyncio.gather(*requests)
            assert [body["served_by"] for _, body in answers] == ["decode-1", "decode-1"]
            assert job.engine_state("decode-0") == "LOST"

    asyncio.run(scenario())


def test_an_idle_connection_that_the_engine_closed_costs_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            assert (await job.post())[0] == 200
            for vllm in job.vllms.values():
                vllm.abort_connections()
            assert (await job.post())[0] == 200

    asyncio.run(scenario())


def test_a_body_that_never_arrives_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, request_timeout_s=0.2) as job:

            async def endless() -> Any:
                yield b"{"
                await asyncio.sleep(5)

            url = job.url + "/v1/completions"
            async with job.client.post(url, data=endless()) as response:
                assert response.status == 408
            with_timeout = aiohttp.ClientTimeout(total=5)
            async with job.client.get(job.url + "/health", timeout=with_timeout) as response:
                assert response.status == 200

    asyncio.run(scenario())
