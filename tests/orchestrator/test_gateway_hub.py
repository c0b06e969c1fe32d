# SPDX-License-Identifier: Apache-2.0
"""The control connection: who gets in, and what is carried between the ranks."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import aiohttp
import pytest
from gateway_rig import HEARTBEAT_S, SECRET, WAIT_S, Rank, Vllm, rig, until

from rdma_kv_cache.cluster.hub_client import HubClient
from rdma_kv_cache.protocol.bootstrap import Bundle, Bundles, EngineHello, PeerDown, WorkerId
from rdma_kv_cache.protocol.codec import PROTOCOL_VERSION, sign, verify
from rdma_kv_cache.protocol.control import (
    Announce,
    Attach,
    Challenge,
    Heartbeat,
    Relay,
    Restart,
    Stop,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
from typing import Any

HELLO = EngineHello("decode-0", "decode", "localhost", 101, 1)


def attach(nonce: bytes, hello: EngineHello = HELLO, secret: bytes = SECRET) -> bytes:
    return sign(Attach(hello, nonce, "http://127.0.0.1:1"), secret)


def other_version(frame: bytes) -> bytes:
    return bytes([PROTOCOL_VERSION + 1]) + frame[1:]


BAD_FIRST_FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda nonce: attach(nonce)[:20],
    "cut body": lambda nonce: attach(nonce)[:-1],
    "empty": lambda _nonce: b"",
    "wrong secret": lambda nonce: attach(nonce, secret=b"x" * 32),
    "wrong version": lambda nonce: other_version(attach(nonce)),
    "random": lambda _nonce: os.urandom(200),
    "other challenge": lambda _nonce: attach(b"n" * 32),
    "unknown engine": lambda nonce: attach(nonce, EngineHello("decode-9", "decode", "h", 5, 1)),
    "wrong role": lambda nonce: attach(nonce, EngineHello("decode-0", "prefill", "h", 5, 1)),
    "not an attach": lambda _nonce: sign(Heartbeat("decode-0", 101, "READY", 0, 1, 1), SECRET),
}


@pytest.mark.parametrize("name", BAD_FIRST_FRAMES)
def test_a_bad_first_frame_is_refused(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        async with (
            rig(tmp_path, ready=False) as job,
            job.client.ws_connect(job.url + "/internal/control") as socket,
        ):
            challenge: Challenge = verify(
                await socket.receive_bytes(timeout=WAIT_S), SECRET, Challenge
            )
            await socket.send_bytes(BAD_FIRST_FRAMES[name](challenge.nonce))
            frame = await socket.receive(timeout=WAIT_S)
            assert frame.type is aiohttp.WSMsgType.CLOSE
            assert frame.data == aiohttp.WSCloseCode.POLICY_VIOLATION
            assert job.folder.state.engines[1].url == ""

    asyncio.run(scenario())


def test_a_recorded_attach_does_not_open_another_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, ready=False) as job:
            path = job.url + "/internal/control"
            async with job.client.ws_connect(path) as first, job.client.ws_connect(path) as second:
                frame = await first.receive_bytes(timeout=WAIT_S)
                challenge: Challenge = verify(frame, SECRET, Challenge)
                await second.receive_bytes(timeout=WAIT_S)
                recorded = attach(challenge.nonce)
                await first.send_bytes(recorded)
                await second.send_bytes(recorded)
                refusal = await second.receive(timeout=WAIT_S)
                assert refusal.data == aiohttp.WSCloseCode.POLICY_VIOLATION
                assert not first.closed

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "frame",
    [
        sign(Heartbeat("prefill-0", 100, "LOST", 0, 1, 1), SECRET),
        sign(Announce(EngineHello("prefill-0", "prefill", "h", 7, 1), "http://x"), SECRET),
        sign(Relay("decode-7", Bundles([])), SECRET),
        sign(Heartbeat("decode-0", 101, "READY", 0, 1, 1), b"x" * 32),
        attach(b""),
        os.urandom(64),
    ],
    ids=["heartbeat of another", "announce of another", "unknown target", "secret", "attach", "?"],
)
def test_a_bad_later_frame_ends_the_connection_and_changes_nothing(
    tmp_path: Path, frame: bytes
) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            rank = job.ranks["decode-0"]
            before = job.folder.state.engines
            await rank.send_raw(frame)
            await until(lambda: rank.close_code, "closed")
            assert rank.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION
            assert job.folder.state.engines[0] == before[0]

    asyncio.run(scenario())


def test_bundles_reach_the_engine_they_are_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 2, 2) as job:
            sender, receiver = WorkerId("prefill-1", 0, 101), WorkerId("decode-1", 0, 103)
            relay = Relay("decode-1", Bundles([Bundle(sender, receiver, os.urandom(100))]))
            await job.ranks["prefill-1"].send(relay)
            await until(lambda: job.ranks["decode-1"].got(Relay), "the relay")
            assert job.ranks["decode-1"].got(Relay) == [relay]
            assert not any(job.ranks[name].got(Relay) for name in ("prefill-0", "decode-0"))

    asyncio.run(scenario())


def test_messages_wait_for_a_rank_that_reconnects(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, health_timeout_s=30) as job:
            old = job.ranks["decode-0"]
            await old.close()
            relay = Relay("decode-0", Bundles([]))
            await job.ranks["prefill-0"].send(relay)
            again = Rank(old.hello, old.vllm, 1)
            job.ranks["decode-0"] = again
            await again.attach(job.url)
            await until(lambda: again.got(Relay), "the relay")
            assert (await job.post())[0] == 200

    asyncio.run(scenario())


def test_a_restarted_engine_is_announced_to_the_other_role_and_probed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 2, 1) as job:
            rank, decode = job.ranks["prefill-0"], job.ranks["decode-0"]
            rank.state, rank.reason = "RESTARTING", "vLLM was killed by signal 9"
            await until(lambda: decode.got(PeerDown), "PeerDown")
            assert decode.got(PeerDown) == [PeerDown("prefill-0", 100, rank.reason)]
            probes = len(job.vllms["prefill-0"].requests)
            await rank.announce(500)
            await until(lambda: decode.got(Announce), "Announce")
            assert decode.got(Announce) == [Announce(rank.hello, rank.vllm.url)]
            assert job.ranks["prefill-1"].received == []

            while (await job.get("/ready"))[1]["pairs"] < 2:
                await asyncio.sleep(0.01)
            assert len(job.vllms["prefill-0"].requests) == probes + 1
            engine = job.folder.state.engines[0]
            assert (engine.incarnation, engine.restarts) == (500, 1)

    asyncio.run(scenario())


def test_ready_of_an_incarnation_that_was_not_announced_does_not_count(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            rank = job.ranks["decode-0"]
            rank.state = "RESTARTING"
            await until(lambda: job.engine_state("decode-0") == "RESTARTING", "RESTARTING")
            unannounced = Heartbeat("decode-0", 999, "READY", 1, 1, 1)
            await rank.send(unannounced)
            await rank.send(Relay("prefill-0", Bundles([])))
            await until(lambda: job.ranks["prefill-0"].got(Relay), "frames were read")
            assert job.engine_state("decode-0") == "RESTARTING"

    asyncio.run(scenario())


def test_a_lost_engine_that_comes_back_is_restarted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 2, 1) as job:
            rank = job.ranks["prefill-0"]
            rank.beating = False
            await until(lambda: job.engine_state("prefill-0") == "LOST", "LOST")
            await until(lambda: job.ranks["decode-0"].got(PeerDown), "PeerDown")
            rank.beating = True
            await until(lambda: rank.got(Restart), "Restart")
            assert "no heartbeat" in rank.got(Restart)[0].reason
            await asyncio.sleep(0.2)
            assert len(rank.got(Restart)) == 1

    asyncio.run(scenario())


def test_a_lost_engine_that_attaches_anew_is_restarted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, 2, 1) as job:
            old = job.ranks["prefill-0"]
            await old.close()
            await until(lambda: job.engine_state("prefill-0") == "LOST", "LOST")
            again = Rank(old.hello, old.vllm, 1)
            job.ranks["prefill-0"] = again
            await again.attach(job.url)
            await until(lambda: again.got(Restart), "Restart")

    asyncio.run(scenario())


def test_the_newest_connection_of_an_engine_counts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as job:
            old = job.ranks["decode-0"]
            new = Rank(old.hello, Vllm("unused"), 1)
            new.vllm.url = old.vllm.url
            job.ranks["new"] = new
            await new.attach(job.url)
            await until(lambda: old.close_code, "the old connection closed")
            await job.ranks["prefill-0"].send(Relay("decode-0", Bundles([])))
            await until(lambda: new.got(Relay), "the relay")

    asyncio.run(scenario())


class View:
    """An engine, as its rank's hub client asks for it."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def identity(self) -> tuple[EngineHello, str]:
        return self.rank.hello, self.rank.vllm.url

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(self.rank.hello.engine, self.rank.hello.incarnation, "READY", 0, 1, 1)


def test_the_ranks_own_client_speaks_with_the_hub(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, ready=False) as job:
            received: list[Any] = []
            await job.ranks["prefill-0"].attach(job.url)
            client = HubClient(
                job.url, SECRET, View(job.ranks["decode-0"]), received.append, HEARTBEAT_S
            )
            async with client:
                job.world.passed.set()
                await until(lambda: job.folder.state.state == "READY", "READY")
                relay = Relay("decode-0", Bundles([]))
                await job.ranks["prefill-0"].send(relay)
                client.send(Relay("prefill-0", Bundles([])))
                await until(lambda: received, "the relay")
                assert received == [relay]
                await until(lambda: job.ranks["prefill-0"].got(Relay), "its relay")
                job.stop.set()
                await until(lambda: Stop("the job ends") in received, "Stop")
            assert await job.exit_code == 0

    asyncio.run(scenario())
