# SPDX-License-Identifier: Apache-2.0
"""Messages between engine ranks and the orchestrator's hub (one websocket an engine rank)."""

from __future__ import annotations

from typing import Literal, Union

import msgspec

from rdma_kv_cache.protocol.bootstrap import Bundles, EngineHello, PathInfo, PeerDown

EngineState = Literal["STARTING", "READY", "RESTARTING", "STOPPED", "LOST"]


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """First frame of an engine rank. `nonce` repeats the hub's Challenge (no replay)."""

    hello: EngineHello
    nonce: bytes
    url: str


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """First frame of the hub: a random nonce that the Attach must repeat."""

    nonce: bytes


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Engine rank to hub, every `orchestrator.heartbeat_s`.

    `pid` is the vLLM server's; `paths` are by peer engine, of those that are connected.
    """

    engine: str
    incarnation: int
    state: EngineState
    restarts: int
    peers_connected: int
    peers_expected: int
    reason: str = ""
    pid: int = 0
    gpus: list[str] = []
    nics: list[str] = []
    transport: str = ""
    paths: dict[str, PathInfo] = {}


class Announce(msgspec.Struct, frozen=True, tag="announce"):
    """An engine has a new incarnation (its vLLM was restarted); the hub tells the peers."""

    hello: EngineHello
    url: str


class Relay(msgspec.Struct, frozen=True, tag="relay"):
    """Bundles to be carried to `engine`; the hub does not look inside."""

    engine: str
    bundles: Bundles


class Restart(msgspec.Struct, frozen=True, tag="restart"):
    """Hub to engine rank: end your vLLM (it may hang) and start it again."""

    reason: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Hub to engine rank: end your vLLM and exit with code 0."""

    reason: str


ToHub = Union[Attach, Heartbeat, Announce, Relay]  # noqa: UP007 - evaluated at run time on 3.10
FromHub = Union[Challenge, Announce, PeerDown, Relay, Restart, Stop]  # noqa: UP007
