# SPDX-License-Identifier: Apache-2.0
"""Messages between an engine rank and its vLLM workers, and between engine ranks.

The queue-pair exchange: a worker creates one endpoint per (peer worker, peer incarnation) and
sends a `Bundle` for it; the ranks carry bundles to each other (one MPI collective at start, the
orchestrator's hub after that) and hand them to the worker they are addressed to.
"""

from __future__ import annotations

from typing import Union

import msgspec


class WorkerId(msgspec.Struct, frozen=True, array_like=True):
    """One vLLM worker: the engine's name, its TP rank and the engine's incarnation."""

    engine: str
    tp_rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.engine}/{self.tp_rank}"


class EngineHello(msgspec.Struct, frozen=True, tag="engine_hello"):
    """What every rank tells every other before its vLLM starts."""

    engine: str
    role: str
    host: str
    incarnation: int
    tp_size: int


class WorkerHello(msgspec.Struct, frozen=True, tag="worker_hello"):
    """Worker to its rank: the first message on the bootstrap socket."""

    worker: WorkerId
    role: str
    pid: int
    backend: str
    transport: str
    """What the backend uses and why, for people: devices, ports, GIDs."""


class PeerUp(msgspec.Struct, frozen=True, tag="peer_up"):
    """Rank to worker: an engine of the other role exists in this incarnation."""

    engine: str
    incarnation: int
    tp_size: int


class PeerDown(msgspec.Struct, frozen=True, tag="peer_down"):
    """Rank to worker: that incarnation is gone; close its endpoints."""

    engine: str
    incarnation: int
    reason: str


class Bundle(msgspec.Struct, frozen=True, tag="bundle"):
    """What one worker must know to connect to one other: endpoint, memory and KV geometry.

    `payload` is opaque to the ranks (the connector's own encoding).
    """

    sender: WorkerId
    receiver: WorkerId
    payload: bytes


class PathInfo(msgspec.Struct, frozen=True):
    """The way of the bytes between two workers, or two engines.

    `warning` says why it is slower than the hardware allows and what to do; empty if it is not.
    """

    backend: str
    description: str = ""
    warning: str = ""


class PeerState(msgspec.Struct, frozen=True, tag="peer_state"):
    """Worker to its rank: `connected` means that the probe write was verified end to end."""

    worker: WorkerId
    peer: WorkerId
    connected: bool
    reason: str = ""
    path: PathInfo | None = None


class Bundles(msgspec.Struct, frozen=True, tag="bundles"):
    """All bundles of one engine for one other engine, as carried between ranks."""

    bundles: list[Bundle]


FromWorker = Union[WorkerHello, Bundle, PeerState]  # noqa: UP007 - evaluated at run time on 3.10
ToWorker = Union[PeerUp, PeerDown, Bundle]  # noqa: UP007
