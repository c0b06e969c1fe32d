# SPDX-License-Identifier: Apache-2.0
"""How requests travel through the orchestrator when nothing fails."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from gateway_rig import HEARTBEAT_S, MODEL, Vllm, params_of, rig, until

from rdma_kv_cache.protocol.bootstrap import PathInfo
from rdma_kv_cache.protocol.codec import engine_api_key

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "tell me"}]


def meet(vllms: list[Vllm]) -> None:
    """Let each of `vllms` answer only once all of them have been asked."""
    asked: set[str] = set()
    all_asked = asyncio.Event()

    def behaviour(vllm: Vllm) -> Any:
        async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            asked.add(vllm.name)
            if len(asked) == len(vllms):
                all_asked.set()
            await all_asked.wait()
            return await vllm.complete(request, body)

        return behave

    for vllm in vllms:
        vllm.behave = behaviour(vllm)


def test_both_legs_run_at_once_with_bodies_made_from_the_clients(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            meet(list(job.vllms.values()))
            sent = {
                "messages": MESSAGES,
                "max_completion_tokens": 50,
                "min_tokens": 3,
                "temperature": 0.5,
                "seed": 2**70,
                "stop": ["\ud800"],
                "logprobs": None,
            }
            status, answer = await job.post(CHAT, **sent)
            assert status == 200
            assert answer["served_by"] == "decode-0"
            [prefill], [decode] = job.calls("prefill-0"), job.calls("decode-0")
            transfer = params_of(prefill)["transfer_id"]
            absent = dict.fromkeys(
                ["remote_engine_id", "remote_block_ids", "remote_host", "remote_port"]
            )
            assert prefill.pop("kv_transfer_params") == {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "transfer_id": transfer,
                **absent,
            }
            assert decode.pop("kv_transfer_params") == {
                **absent,
                "do_remote_decode": False,
                "do_remote_prefill": True,
                "remote_request_id": transfer,
                "remote_engine_id": "prefill-0",
            }
            original = {"model": "tiny", "prompt": "hello there", **sent}
            assert decode == original
            one_token = {"max_tokens": 1, "max_completion_tokens": 1, "n": 1, "stream": False}
            del original["min_tokens"]
            assert prefill == {**original, **one_token}
            for vllm in job.vllms.values():
                _, _, headers = vllm.requests[-1]
                assert headers["X-Request-Id"] == transfer
                assert headers["Authorization"] == f"Bearer {engine_api_key(b's' * 32)}"

    asyncio.run(scenario())


def test_a_stream_passes_through_byte_by_byte_and_unbuffered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            gate = asyncio.Event()
            decode = job.vllms["decode-0"]
            decode.behave = lambda request, _body: decode.stream(request, ["one", "two"], gate)
            body = {"prompt": "p", "stream": True, "stream_options": {"include_usage": True}}
            async with job.client.post(job.url + "/v1/completions", json=body) as response:
                assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
                # The engine does not go on before the client has this first event.
                assert await response.content.readuntil(b"\n\n") == b'data: {"text": "one"}\n\n'
                gate.set()
                rest = await response.content.read()
            assert rest == b'data: {"text": "two"}\n\ndata: [DONE]\n\n'
            [prefill] = job.calls("prefill-0")
            assert "stream_options" not in prefill
            assert prefill["stream"] is False

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 2},
        {"best_of": 3},
        {"echo": True},
        {"prompt_logprobs": 0},
        {"use_beam_search": True},
        {"prompt": ["one", "two"]},
        {"prompt": [[1, 2], [3]]},
    ],
)
def test_what_one_transfer_cannot_serve_goes_to_decode_alone(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            assert (await job.post(**extra))[0] == 200
            assert job.calls("prefill-0") == []
            assert job.calls("decode-0") == [{"model": "tiny", "prompt": "hello there", **extra}]

    asyncio.run(scenario())


def test_clients_cannot_steer_transfers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            mine = {"do_remote_prefill": True, "remote_host": "evil"}
            for path in ("/v1/responses", "/v1/completions"):
                extra = {"n": 2, "kv_transfer_params": mine}
                extra["vllm_xargs"] = {"kv_transfer_params": "x", "other": 1}
                assert (await job.post(path, **extra))[0] == 200
            for body in job.calls("decode-0"):
                assert "kv_transfer_params" not in body
                assert body["vllm_xargs"] == {"other": 1}
            assert [path for path, _, _ in job.vllms["decode-0"].requests][-2:] == [
                "/v1/responses",
                "/v1/completions",
            ]

    asyncio.run(scenario())


def test_short_prompts_go_to_decode_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, disaggregate_above_tokens=10) as job:
            for prompt in ("x" * 43, [1] * 10, ["x" * 40], [[1] * 10]):
                assert (await job.post(prompt=prompt))[0] == 200
            assert job.calls("prefill-0") == []
            for prompt in ("é" * 22, [1] * 11):
                assert (await job.post(prompt=prompt))[0] == 200
            text = [{"role": "user", "content": [{"type": "text", "text": "y" * 44}]}]
            assert (await job.post(CHAT, prompt=None, messages=text))[0] == 200
            assert len(job.calls("prefill-0")) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded"])
def test_requests_spread_over_all_engines(tmp_path: Path, policy: str) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 2, 2, policy=policy) as job:
            meet(list(job.vllms.values()))  # nobody is answered before all four engines are asked
            answers = await asyncio.gather(*(job.post() for _ in range(4)))
            assert [status for status, _ in answers] == [200] * 4
            assert [len(job.calls(name)) for name in job.vllms] == [2, 2, 2, 2]

    asyncio.run(scenario())


def test_refusals_of_the_model_are_the_models_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            refusal = {"error": {"message": "no such model", "code": 404}}

            async def refuse(_r: web.Request, _b: dict[str, Any]) -> web.StreamResponse:
                return web.json_response(refusal, status=404)

            decode = job.vllms["decode-0"]
            job.vllms["prefill-0"].behave = job.vllms["prefill-0"].hang
            decode.behave = refuse
            assert await job.post(model="x") == (404, refusal)
            await until(lambda: job.vllms["prefill-0"].cancelled == 1, "prefill cancelled")

    asyncio.run(scenario())


def test_bad_bodies_are_refused_before_any_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            deep = b"[" * 200_000
            for raw in (
                b"",
                b"{",
                b"[1]",
                b"\xff\xfe",
                b'"x"',
                deep,
                b'{"a": ' + b"9" * 5000 + b"}",
            ):
                async with job.client.post(job.url + CHAT, data=raw) as response:
                    assert response.status == 400, raw[:20]
                    error = (await response.json())["error"]
                    assert error["type"] == "invalid_request_error"
                    assert error["code"] == "invalid_json"
            assert job.calls("decode-0") == job.calls("prefill-0") == []
            async with job.client.post(
                job.url + CHAT, data=io.BytesIO(b"x" * (65 << 20))
            ) as response:
                assert response.status == 413
            for path, status in (("/v1/nope", 404), ("/v1/completions", 405)):
                got, body = await job.get(path)
                assert (got, set(body["error"])) == (status, {"message", "type", "code", "param"})

    asyncio.run(scenario())


def test_the_key_is_asked_for_except_on_health_and_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job, aiohttp.ClientSession() as stranger:
            key_file = Path(job.folder.state.api_key_file)
            assert key_file.read_text().startswith("rkv-")
            assert key_file.stat().st_mode & 0o777 == 0o600
            for path in ("/v1/models", "/metrics", "/nodes", "/nope"):
                for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "ä"}):
                    async with stranger.get(job.url + path, headers=header) as response:
                        assert response.status == 401
                        assert (await response.json())["error"]["code"] == "invalid_api_key"
            for path in ("/health", "/ready"):
                async with stranger.get(job.url + path) as response:
                    assert response.status == 200
            assert await job.get("/v1/models") == (200, MODEL)

    asyncio.run(scenario())


def test_no_key_is_asked_for_when_switched_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, api_key="none") as job:
            assert not (tmp_path / "api.key").exists()
            assert job.folder.state.api_key_file == ""
            assert (await job.post())[0] == 200

    asyncio.run(scenario())


def test_more_than_max_inflight_gets_429(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, max_inflight=2) as job:
            gate = asyncio.Event()
            decode = job.vllms["decode-0"]

            async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await gate.wait()
                return await decode.complete(request, body)

            decode.behave = wait
            held = [asyncio.ensure_future(job.post()) for _ in range(2)]
            await until(lambda: decode.open == 2, "two requests at decode")
            async with job.client.post(job.url + CHAT, json={}) as response:
                assert response.status == 429
                assert response.headers["Retry-After"] == "1"
                assert (await response.json())["error"]["type"] == "rate_limit_error"
            gate.set()
            assert [status for status, _ in await asyncio.gather(*held)] == [200, 200]
            assert (await job.post())[0] == 200

    asyncio.run(scenario())


def test_metrics_count_requests_and_carry_the_engines_series(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            await job.post()
            body = {"prompt": "p", "stream": True}
            async with job.client.post(job.url + "/v1/completions", json=body) as response:
                await response.read()
            async with job.client.get(job.url + "/metrics") as response:
                lines = (await response.text()).splitlines()
            assert 'rdma_kv_requests_total{route="/v1/completions",status="200"} 2.0' in lines
            assert 'rdma_kv_dispatches_total{path="pair"} 2.0' in lines
            assert "rdma_kv_ttft_seconds_count 1.0" in lines
            assert "rdma_kv_requests_inflight 0.0" in lines
            assert 'rdma_kv_engine_ready{engine_name="decode-0",role="decode"} 1.0' in lines
            for name in ("prefill-0", "decode-0"):
                labels = (
                    f'engine="0",engine_name="{name}",model_name="tiny",role="{name.split("-")[0]}"'
                )
                assert f"vllm:rdma_kv_bytes_total{{{labels}}} 4096.0" in lines
                assert f"vllm:num_requests_running{{{labels}}} 2.0" in lines
            assert sum(line.startswith("# TYPE vllm:rdma_kv_bytes_total") for line in lines) == 1
            assert not any("prompt_tokens" in line for line in lines)

    asyncio.run(scenario())


def test_the_way_of_each_pair_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 1, 2) as job:
            job.ranks["prefill-0"].paths = {
                "decode-0": PathInfo("cuda_ipc", "cuda_ipc: same GPU"),
                "decode-1": PathInfo("tcp", "tcp: 10.0.0.1", "tcp is used because of no NIC"),
            }
            job.ranks["decode-0"].paths = {"prefill-0": PathInfo("cuda_ipc")}

            async def paths() -> list[dict[str, str]]:
                _, nodes = await job.get("/nodes")
                return nodes["engines"][0]["paths"]

            while not await paths():  # until the next heartbeat
                await asyncio.sleep(HEARTBEAT_S)
            assert (await paths())[1] == {
                "peer": "decode-1",
                "backend": "tcp",
                "description": "tcp: 10.0.0.1",
                "warning": "tcp is used because of no NIC",
            }
            async with job.client.get(job.url + "/metrics") as response:
                lines = (await response.text()).splitlines()
            told = [line for line in lines if line.startswith(("rdma_kv_peer", "rdma_kv_slow"))]
            assert told == [
                'rdma_kv_peer_path_info{backend="cuda_ipc",decode="decode-0",prefill="prefill-0"} 1.0',
                'rdma_kv_peer_path_info{backend="tcp",decode="decode-1",prefill="prefill-0"} 1.0',
                'rdma_kv_slow_path{decode="decode-0",prefill="prefill-0"} 0.0',
                'rdma_kv_slow_path{decode="decode-1",prefill="prefill-0"} 1.0',
            ]

    asyncio.run(scenario())


def test_nodes_and_ready_describe_the_engines(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 1, 2) as job:
            _, nodes = await job.get("/nodes")
            names = [(engine["name"], engine["state"]) for engine in nodes["engines"]]
            assert names == [(name, "READY") for name in ("prefill-0", "decode-0", "decode-1")]
            assert json.loads(json.dumps(nodes))["engines"][0]["incarnation"] == "100"
            assert await job.get("/ready") == (200, {"ready": True, "pairs": 2})
            assert await job.get("/health") == (200, {"status": "alive"})

    asyncio.run(scenario())
