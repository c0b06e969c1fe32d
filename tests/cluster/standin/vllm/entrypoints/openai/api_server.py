# SPDX-License-Identifier: Apache-2.0
"""Stands where vLLM stands: the peer program of an engine rank, without a model.

It takes vLLM's command line, serves the HTTP paths that the orchestrator asks for, and speaks a
worker's side of the bootstrap socket; a pair counts as connected when both bundles arrived.
Like vLLM it runs its "engine core" as a process of its own, which outlives a killed server.
STANDIN in the environment chooses a fault, STANDIN_ASKED a file to which decode engines add each
request's prompt, a line of JSON, and STANDIN_ANSWER_S how long they take to answer then.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from rdma_kv_cache.protocol.bootstrap import (
    Bundle,
    PeerState,
    PeerUp,
    ToWorker,
    WorkerHello,
    WorkerId,
)
from rdma_kv_cache.protocol.codec import FrameReader, decode, encode, frame

ASKED = web.AppKey("asked", str)


def option(name: str) -> str:
    """The value of a command line option."""
    return sys.argv[sys.argv.index(name) + 1]


class Worker:
    """The one worker of this engine."""

    def __init__(self, config: dict[str, Any], fault: str) -> None:
        extra = config["kv_connector_extra_config"]
        self.me = WorkerId(config["engine_id"], 0, int(extra["incarnation"]))
        self.role = "prefill" if config["kv_role"] == "kv_producer" else "decode"
        self.path = extra["bootstrap_socket"]
        self.fault = fault

    async def run(self) -> None:
        reader, writer = await asyncio.open_unix_connection(self.path)

        def send(message: Any) -> None:
            writer.write(frame(encode(message)))

        send(WorkerHello(self.me, self.role, os.getpid(), "tcp", "tcp"))
        frames = FrameReader()
        while data := await reader.read(1 << 16):
            for body in frames.feed(data):
                message: Any = decode(body, ToWorker)
                if isinstance(message, PeerUp):
                    peer = WorkerId(message.engine, 0, message.incarnation)
                    send(Bundle(self.me, peer, f"{self.me} to {peer}".encode()))
                elif isinstance(message, Bundle):
                    assert message.payload == f"{message.sender} to {self.me}".encode()
                    reason = "incompatible engines: dtype" if self.fault == "incompatible" else ""
                    send(PeerState(self.me, message.sender, not reason, reason))


async def health(_request: web.Request) -> web.Response:
    return web.Response()


async def models(_request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})


def note(file: str, prompt: Any) -> None:
    """Add a line, by one write: other engines add to it too."""
    with Path(file).open("a") as output:
        output.write(json.dumps(prompt) + "\n")


async def completions(request: web.Request) -> web.Response:
    if request.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
        return web.Response(status=401)
    if asked := request.app[ASKED]:
        note(asked, (await request.json())["prompt"])
        await asyncio.sleep(float(os.environ.get("STANDIN_ANSWER_S", "0")))
    return web.json_response(
        {
            "id": "c",
            "object": "text_completion",
            "model": "m",
            "choices": [{"index": 0, "text": "yes", "finish_reason": "length"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        }
    )


async def serve(fault: str) -> None:
    worker = Worker(json.loads(option("--kv-transfer-config")), fault)
    app = web.Application()
    app[ASKED] = os.environ.get("STANDIN_ASKED", "") if worker.role == "decode" else ""
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/v1/models", models),
            web.post("/v1/completions", completions),
            web.post("/v1/chat/completions", completions),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, option("--host"), int(option("--port"))).start()
    await worker.run()


def main() -> None:
    fault = os.environ.get("STANDIN", "")
    if fault == "exit":
        sys.exit(3)
    if fault == "once":  # starts well one time, and never again
        marker = Path(os.environ["STANDIN_MARKER"])
        if marker.exists():
            sys.exit(4)
        marker.touch()
    core = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("engine core", core.pid, flush=True)
    asyncio.run(serve(fault))


main()
