# SPDX-License-Identifier: Apache-2.0
"""One attempt at a request: the decode leg and, when disaggregated, the prefill leg beside it."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdma_kv_cache.orchestrator.bodies import Body, decode_body, prefill_body
from rdma_kv_cache.orchestrator.legs import Answer, Leg, failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from rdma_kv_cache.orchestrator.engines import Engine

# Both engines check the body at about the same time. When prefill has refused it, decode's own
# answer is preferred (its limits are the ones that matter), but not waited for much longer.
REFUSAL_GRACE_S = 2.0


@dataclass(frozen=True)
class Attempt:
    """A running attempt: the answer, and the decode leg that more of it may come from."""

    answer: Answer
    decode: Leg
    request_id: str


@contextlib.asynccontextmanager
async def attempt(
    session: aiohttp.ClientSession,
    path: str,
    body: Body,
    prefill: Engine | None,
    decode: Engine,
    timeout_s: float,
) -> AsyncIterator[Attempt]:
    """Dispatch to both engines at once and yield when there is something for the client.

    `prefill` None sends the request to decode alone. Leaving the context ends both legs.
    Raises LegError while nothing of the answer is known yet.
    """
    request_id = uuid.uuid4().hex
    legs = []
    try:
        if prefill is None:
            leg = Leg(session, decode, path, body, request_id, timeout_s)
            legs.append(leg)
            answer = await leg.start()
        else:
            decode_request = decode_body(body, request_id, prefill.name)
            prefill_request = prefill_body(body, path, request_id)
            leg = Leg(session, decode, path, decode_request, request_id, timeout_s)
            other = Leg(session, prefill, path, prefill_request, request_id, timeout_s)
            legs += [leg, other]
            answer = await _first(leg, other)
        if answer.engine_failed:
            raise failure(leg.engine, answer)
        yield Attempt(answer, leg, request_id)
    finally:
        for leg in legs:
            leg.close()


async def _first(decode: Leg, prefill: Leg) -> Answer:
    """Return decode's answer, or prefill's refusal. Raises LegError if either engine fails first.

    A prefill leg that fails after decode's first byte does not matter: decode has its KV.
    """
    answered = decode.start()
    prefilled = prefill.start()
    # Its failure may come when nobody waits for it any more.
    prefilled.add_done_callback(_retrieve)
    answered.add_done_callback(_retrieve)
    await asyncio.wait({answered, prefilled}, return_when=asyncio.FIRST_COMPLETED)
    if not answered.done():
        refusal = prefilled.result()
        if refusal.engine_failed:
            raise failure(prefill.engine, refusal)
        if refusal.status >= 400:
            await asyncio.wait({answered}, timeout=REFUSAL_GRACE_S)
            if not answered.done():
                return refusal
    return await answered


def _retrieve(task: asyncio.Task[Answer]) -> None:
    if not task.cancelled():
        task.exception()
