# SPDX-License-Identifier: Apache-2.0
"""One life of an engine with the stand-in: a lost port, a start that takes too long."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from rdma_kv_cache.cluster import engine_life
from rdma_kv_cache.cluster.engine_life import EngineFailed, EngineLife
from rdma_kv_cache.cluster.tasks import cancel
from rdma_kv_cache.cluster.vllm_process import free_port
from rdma_kv_cache.protocol.bootstrap import Bundle, EngineHello
from tests.cluster.conftest import STANDIN, make_job, python_path

if TYPE_CHECKING:
    from pathlib import Path

    from rdma_kv_cache.config import JobConfig

ME = EngineHello("decode-0", "decode", "host", 5, 1)
PEER = EngineHello("prefill-0", "prefill", "host", 6, 1)


class Rank:
    """The owner of the life: notes what it is told."""

    def __init__(self) -> None:
        self.urls = 0
        self.bundles: list[Bundle] = []

    def url_chosen(self) -> None:
        self.urls += 1

    def bundle_offered(self, bundle: Bundle) -> None:
        self.bundles.append(bundle)

    def links_changed(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _standin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path(STANDIN))


def make_life(folder: Path, rank: Rank, job: JobConfig, *peers: EngineHello) -> EngineLife:
    return EngineLife(
        ME,
        peers,
        job,
        bind_host="127.0.0.1",
        api_key="key",
        log_file=folder / "decode-0.log",
        events=rank,
    )


def test_a_port_that_was_taken_meanwhile_is_chosen_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        rank = Rank()
        life = make_life(tmp_path, rank, make_job())
        try:
            await life.start()
            await life.wait_ready()
        finally:
            await life.end(2)
        assert rank.urls == 2
        assert life.url == f"http://127.0.0.1:{ports[1]}"

    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], free_port("127.0.0.1")]
        left = iter(ports)
        monkeypatch.setattr(engine_life, "free_port", lambda _host: next(left))
        asyncio.run(main())


def test_a_port_that_is_taken_again_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        rank = Rank()
        life = make_life(tmp_path, rank, make_job(), PEER)
        try:
            await life.start()
            with pytest.raises(EngineFailed, match="vLLM exited with code 1") as error:
                await life.wait_offers()
            assert str(tmp_path / "decode-0.log") in str(error.value)
            assert rank.urls == 2
        finally:
            await life.end(2)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(engine_life, "free_port", lambda _host: port)
        asyncio.run(main())


def test_a_start_is_bounded_and_says_what_is_missing(tmp_path: Path) -> None:
    async def main() -> None:
        rank = Rank()
        job = make_job(orchestrator={"engine_start_timeout_s": 1.0})
        life = make_life(tmp_path, rank, job, PEER)
        try:
            await life.start()
            with pytest.raises(EngineFailed) as error:
                await life.wait_ready()
        finally:
            await life.end(2)
        assert "not ready after 1 s (orchestrator.engine_start_timeout_s)" in str(error.value)
        assert "decode-0/0 - prefill-0/0: nothing heard" in str(error.value)

    asyncio.run(main())


def test_cancel_ends_a_task_that_drops_its_first_cancellation() -> None:
    """As wait_for does before Python 3.12 when the result comes at the same moment."""
    dropped = 0

    async def stubborn() -> None:
        nonlocal dropped
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                dropped += 1
                if dropped > 1:
                    raise

    async def main() -> None:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await asyncio.wait_for(cancel([task]), 5)
        assert task.done()

    asyncio.run(main())
    assert dropped == 2
