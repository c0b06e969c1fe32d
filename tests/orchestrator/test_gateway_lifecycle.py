# SPDX-License-Identifier: Apache-2.0
"""Start-up, supervision and the end of a run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from gateway_rig import Rig, params_of, rig, until

from rdma_kv_cache.orchestrator import server
from rdma_kv_cache.protocol.control import Restart, Stop

if TYPE_CHECKING:
    from pathlib import Path


def states(job: Rig) -> list[str]:
    """Return the run's states in order, each once."""
    seen = [state.state for state in job.folder.states]
    return list(dict.fromkeys(seen))


async def attach_all(job: Rig) -> None:
    for rank in job.ranks.values():
        await rank.attach(job.url)


def test_ready_comes_after_the_barrier_and_a_probe_of_every_pair(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 2, 2, ready=False) as job:
            assert job.folder.state.url == job.url
            assert (await job.get("/health"))[0] == 200
            assert (await job.get("/ready"))[0] == 503
            await attach_all(job)
            await asyncio.sleep(0.2)
            assert all(not vllm.requests for vllm in job.vllms.values())
            job.world.passed.set()
            await until(lambda: job.folder.state.state == "READY", "READY")
            probed = {
                (params_of(body)["remote_engine_id"], name)
                for name in ("decode-0", "decode-1")
                for _, body, _ in job.vllms[name].requests
            }
            assert probed == {
                (prefill, decode)
                for prefill in ("prefill-0", "prefill-1")
                for decode in ("decode-0", "decode-1")
            }
            assert job.folder.state.pid == os.getpid()

    asyncio.run(scenario())


def test_requests_while_starting_get_503(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            rig(tmp_path, ready=False, api_key="none") as job,
            job.client.post(job.url + "/v1/completions", json={}) as response,
        ):
            assert response.status == 503
            assert "Retry-After" in response.headers
            assert (await response.json())["error"]["code"] == "starting"

    asyncio.run(scenario())


def test_an_engine_that_gives_up_fails_the_start_with_its_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, ready=False) as job:
            rank = job.ranks["decode-0"]
            rank.state, rank.reason = "STOPPED", "vLLM exited with code 1: out of memory"
            await attach_all(job)
            assert await job.exit_code == 1
            assert states(job) == ["STARTING", "FAILED"]
            assert "decode-0" in job.folder.state.reason
            assert "out of memory" in job.folder.state.reason
            assert all(rank.got(Stop) for rank in job.ranks.values())

    asyncio.run(scenario())


def test_a_rank_that_dies_while_starting_fails_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, ready=False) as job:
            await attach_all(job)
            await job.ranks["prefill-0"].close()
            assert await job.exit_code == 1
            assert "prefill-0 did not start: LOST (no heartbeat" in job.folder.state.reason

    asyncio.run(scenario())


def test_a_start_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(server, "START_MARGIN_S", 0.1)

    async def scenario() -> None:
        async with rig(tmp_path, ready=False, engine_start_timeout_s=0.2) as job:
            assert await job.exit_code == 1
            assert "not ready after 0.3 s: prefill-0 STARTING" in job.folder.state.reason

    asyncio.run(scenario())


def test_a_pair_that_never_serves_its_probe_fails_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, ready=False) as job:
            prefill = job.vllms["prefill-0"]

            async def fail(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
                return web.json_response({"error": "no kv"}, status=500)

            prefill.behave = fail
            job.vllms["decode-0"].behave = job.vllms["decode-0"].hang
            await attach_all(job)
            job.world.passed.set()
            assert await job.exit_code == 1
            assert "prefill-0 and decode-0 did not serve a probe" in job.folder.state.reason
            assert len(prefill.requests) == 3

    asyncio.run(scenario())


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            job = Rig(tmp_path, 1, 1, {"port": port})
            assert await job.serve() == 1
            assert f"bind 127.0.0.1:{port}" in job.folder.state.reason
            assert job.world.url == ""

    asyncio.run(scenario())


def test_sigterm_lets_requests_in_flight_end_and_admits_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            gate = asyncio.Event()
            decode = job.vllms["decode-0"]
            decode.behave = lambda request, _b: decode.stream(request, ["a", "b"], gate)
            body = {"prompt": "p", "stream": True}
            async with job.client.post(job.url + "/v1/completions", json=body) as response:
                await response.content.readuntil(b"\n\n")
                job.stop.set()
                await until(lambda: job.folder.state.state == "DRAINING", "DRAINING")
                async with job.client.post(job.url + "/v1/completions", json={}) as refused:
                    assert refused.status == 503
                    assert refused.headers["Retry-After"] == "30"
                assert (await job.get("/ready"))[0] == 503
                assert not any(rank.got(Stop) for rank in job.ranks.values())
                gate.set()
                assert (await response.content.read()).endswith(b"[DONE]\n\n")
            assert await job.exit_code == 0
            assert all(rank.got(Stop) for rank in job.ranks.values())
            assert states(job) == ["STARTING", "READY", "DRAINING", "DONE"]

    asyncio.run(scenario())


def test_the_end_does_not_wait_for_ever(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(server, "DRAIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(server, "STOP_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with rig(tmp_path) as job:
            for vllm in job.vllms.values():
                vllm.behave = vllm.hang
            for rank in job.ranks.values():
                rank.answers_stop = False
            request = asyncio.ensure_future(job.post())
            await until(lambda: job.vllms["decode-0"].open, "a request")
            job.stop.set()
            assert await job.exit_code == 0
            await until(lambda: job.vllms["decode-0"].cancelled, "the request cut off")
            request.cancel()

    asyncio.run(scenario())


def test_run_ends_orderly_on_a_real_sigterm(tmp_path: Path) -> None:
    async def scenario() -> None:
        job = Rig(tmp_path, 1, 1, {})
        running = asyncio.ensure_future(server.run(job.world, job.job, job.folder))
        await until(lambda: job.url, "bound")
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0
        assert states(job) == ["STARTING", "DRAINING", "DONE"]
        job.world.passed.set()

    asyncio.run(scenario())


def test_an_engine_that_fails_its_health_check_is_restarted_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            rank = job.ranks["decode-0"]
            job.vllms["decode-0"].healthy = False
            await until(lambda: rank.got(Restart), "Restart")
            assert "GET /health fails" in rank.got(Restart)[0].reason
            job.vllms["decode-0"].healthy = True
            await rank.announce(500)
            await until(lambda: job.engine_state("decode-0") == "READY", "READY again")
            assert (await job.post())[0] == 200
            assert len(rank.got(Restart)) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("hung", ["prefill-0", "decode-0", None])
def test_a_pair_that_stays_apart_is_mended_by_restarting_the_hung_engine(
    tmp_path: Path, hung: str | None
) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            if hung is not None:
                job.vllms[hung].behave = job.vllms[hung].hang
            for rank in job.ranks.values():
                rank.peers_connected = 0
            expected = hung or "prefill-0"
            await until(lambda: job.ranks[expected].got(Restart), "Restart")
            others = set(job.ranks) - {expected}
            assert not any(job.ranks[name].got(Restart) for name in others)

    asyncio.run(scenario())


def test_a_pair_that_reconnects_by_itself_is_left_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            for rank in job.ranks.values():
                rank.peers_connected = 0
            probes = len(job.vllms["prefill-0"].requests)
            await until(lambda: len(job.vllms["prefill-0"].requests) > probes, "suspicion")
            for rank in job.ranks.values():
                rank.peers_connected = 1
            await asyncio.sleep(1.0)
            assert not any(rank.got(Restart) for rank in job.ranks.values())
            assert (await job.post())[0] == 200
            assert params_of(job.calls("decode-0")[-1])

    asyncio.run(scenario())


def hold_up_the_event_loop() -> None:
    time.sleep(1.0)  # longer than the rig's health_timeout_s


def test_a_stall_of_the_orchestrator_itself_is_no_silence_of_the_engines(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            hold_up_the_event_loop()
            await asyncio.sleep(0.3)
            assert [state.state for state in job.folder.state.engines] == ["READY", "READY"]
            assert not any(rank.got(Restart) for rank in job.ranks.values())

    asyncio.run(scenario())


def test_the_run_fails_when_no_decode_engine_is_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            rank = job.ranks["decode-0"]
            rank.state, rank.reason = "STOPPED", "given up after 3 restarts"
            assert await job.exit_code == 1
            assert "no decode engine is left" in job.folder.state.reason
            assert "given up after 3 restarts" in job.folder.state.reason

    asyncio.run(scenario())
