# SPDX-License-Identifier: Apache-2.0
"""A chain of serving jobs under client load, on a real Slurm with stand-in engines."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import aiohttp
import pytest

from rdma_kv_cache.slurm import records
from rdma_kv_cache.slurm.service import Current, Service
from tests.slurm import standin
from tests.slurm.machine import poll
from tests.slurm.standin import START_S

if TYPE_CHECKING:
    from tests.slurm import Lab

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

AFTER_S = 8.0
CLIENTS = 4
# Two such jobs fit the lab.
ONE_ENGINE = {"engines": 1, "constraint": "decode"}


class Load:
    """Clients that retry: on any failure they look up where the service is now."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.answered = 0
        self.retried = 0
        self.failed: list[str] = []
        self.stopping = False

    async def run(self) -> None:
        headers = {"Authorization": f"Bearer {self.service.key()}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            await asyncio.gather(*(self._client(session) for _ in range(CLIENTS)))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        url = self._url()
        while not self.stopping:
            for _ in range(20):
                try:
                    await self._ask(session, url)
                except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                    said = repr(error)
                    self.retried += 1
                    await asyncio.sleep(0.5)
                    url = self._url()
                else:
                    self.answered += 1
                    break
            else:
                self.failed.append(said)

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> None:
        body = {"model": "org/model", "prompt": [1, 2, 3], "max_tokens": 4}
        async with session.post(url + "/v1/completions", json=body) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise aiohttp.ClientError(f"{answer.status} {text}")

    def _url(self) -> str:
        current = self.service.current()
        assert current is not None
        return current.url


@pytest.mark.parametrize(
    ("minutes", "signal_s", "by_hand"),
    [(10, 120, True), (2, 60, False)],
    ids=["asked", "time-limit"],
)
def test_successor_takes_over_without_a_failed_request(
    lab: Lab, minutes: int, signal_s: int, by_hand: bool
) -> None:
    job = standin.submit(
        lab, lab.shared / f"chain-{minutes}", "--chain", "1",
        decode=ONE_ENGINE, slurm={"time": minutes, "signal_s": signal_s},
    )  # fmt: skip
    first = job.job_id
    service = Service(job.folder.parent / "job.service")
    assert poll(lambda: service.current() is not None, START_S), lab.log()
    assert current_of(service).job_id == first

    load = Load(service)
    with lab.network():
        asyncio.run(play(lab, load, first, by_hand))

    print(f"{load.answered} answered, {load.retried} retries")
    assert load.failed == []
    assert load.answered > 20
    second = current_of(service)
    assert second.job_id != first
    assert second.generation == 1
    lab.wait_for(first, "COMPLETED")
    # The second one is the last of its chain.
    lab.check("scancel", "--batch", "--signal=USR1", str(second.job_id))
    output = job.folder.with_name(f"job-{second.job_id}.out")
    assert poll(lambda: "the chain has its 1" in output.read_text(), 20)
    lab.check("scancel", str(second.job_id))
    lab.wait_for(second.job_id, "CANCELLED", "COMPLETED")


def test_stop_ends_the_whole_chain(lab: Lab) -> None:
    job = standin.submit(lab, lab.shared / "chain-stop", "--chain", "2")
    job.wait("READY")
    runs = job.folder.parent
    waiting = next(r for r in records.read_all(runs) if r.predecessor == job.job_id)
    assert set(lab.states(waiting.job_id).values()) == {"PENDING"}
    job.stop()
    lab.wait_for(job.job_id, "COMPLETED")
    lab.wait_for(waiting.job_id, "CANCELLED")


def test_successor_serves_after_a_lost_node(lab: Lab) -> None:
    job = standin.submit(lab, lab.shared / "chain-lost", "--chain", "1", decode=ONE_ENGINE)
    service = Service(job.folder.parent / "job.service")
    assert poll(lambda: service.current() is not None, START_S), job.logs()
    node = next(n for n in ("d0", "d1") if lab.address(n) in str(job.state().engines))
    lab.check("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    assert poll(lambda: current_of(service).generation == 1, START_S), job.logs()


async def play(lab: Lab, load: Load, first: int, by_hand: bool) -> None:
    """Load before, while and after the service moves and the first job ends.

    The warning comes by hand, or by Slurm before the time limit.
    """
    running = asyncio.create_task(load.run())
    await asyncio.sleep(1)
    if by_hand:
        lab.check("scancel", "--batch", "--signal=USR1", str(first))
    deadline = time.monotonic() + START_S + 120
    while "RUNNING" in lab.states(first).values() and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    await asyncio.sleep(AFTER_S)
    load.stopping = True
    await running


def current_of(service: Service) -> Current:
    current = service.current()
    assert current is not None
    return current
