# SPDX-License-Identifier: Apache-2.0
"""Which peers one engine has, and how far the connection of each pair of workers is. No I/O."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rdma_kv_cache.protocol.bootstrap import Bundle, PeerDown, PeerState, PeerUp, WorkerId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rdma_kv_cache.protocol.bootstrap import EngineHello, PathInfo, ToWorker

log = logging.getLogger(__name__)

Pair = tuple[WorkerId, WorkerId]  # (own worker, peer worker)


class Links:
    """The pairs of one engine in one incarnation.

    A bundle belongs to one incarnation at both ends; one of any other is dropped. The newest
    bundle of a pair replaces older ones (a worker that reconnects offers a new endpoint).
    """

    def __init__(self, me: EngineHello, peers: Iterable[EngineHello]) -> None:
        self.me = me
        self.peers: dict[str, EngineHello] = {peer.engine: peer for peer in peers}
        self._offers: dict[Pair, Bundle] = {}
        self._received: dict[Pair, Bundle] = {}
        self._states: dict[Pair, PeerState] = {}
        self._failing_since: dict[Pair, float] = {}

    def workers(self) -> list[WorkerId]:
        """Return this engine's workers."""
        return _workers(self.me)

    def pairs(self, peer: EngineHello) -> list[Pair]:
        """Return the pairs with one peer engine: tp_size x the peer's tp_size."""
        return [(mine, theirs) for mine in self.workers() for theirs in _workers(peer)]

    def peer_up(self, peer: EngineHello) -> list[ToWorker]:
        """Take in a peer; return what the workers must be told (nothing if it is known)."""
        known = self.peers.get(peer.engine)
        if known is not None:
            if known.incarnation == peer.incarnation:
                return []
            self._forget(known)
        self.peers[peer.engine] = peer
        return [_peer_up(peer)]

    def peer_down(self, engine: str, incarnation: int, reason: str) -> list[ToWorker]:
        """Forget that incarnation of a peer; return what the workers must be told."""
        known = self.peers.get(engine)
        if known is None or known.incarnation != incarnation:
            return []
        del self.peers[engine]
        self._forget(known)
        return [PeerDown(engine, incarnation, reason)]

    def offer(self, bundle: Bundle) -> bool:
        """Keep what an own worker offers to a peer; False if that peer is gone."""
        return self._keep(self._offers, (bundle.sender, bundle.receiver), bundle)

    def receive(self, bundle: Bundle) -> bool:
        """Keep what a peer's worker offers to an own one; False if it is for another life."""
        return self._keep(self._received, (bundle.receiver, bundle.sender), bundle)

    def offers(self, engine: str) -> list[Bundle]:
        """Return what was offered to `engine` so far."""
        return [bundle for pair, bundle in self._offers.items() if pair[1].engine == engine]

    def greeting(self, worker: WorkerId) -> list[ToWorker]:
        """Return what a worker must be told when it comes: its peers, and what they offered."""
        received = [bundle for pair, bundle in self._received.items() if pair[0] == worker]
        return [*map(_peer_up, self.peers.values()), *received]

    def report(self, state: PeerState, now: float) -> None:
        """Take in a worker's word on one of its pairs; `now` in seconds of any one clock."""
        pair = (state.worker, state.peer)
        if not self._is_known(pair):
            return
        self._states[pair] = state
        if state.connected:
            self._failing_since.pop(pair, None)
        else:
            self._failing_since.setdefault(pair, now)

    def has_all_offers(self) -> bool:
        """Whether every pair with every peer has been offered."""
        return all(
            pair in self._offers for peer in self.peers.values() for pair in self.pairs(peer)
        )

    def is_connected(self, engine: str) -> bool:
        """Whether all pairs with this peer engine are connected."""
        return all(
            (state := self._states.get(pair)) is not None and state.connected
            for pair in self.pairs(self.peers[engine])
        )

    def connected(self) -> int:
        """Return how many peer engines are connected, all pairs of each."""
        return sum(map(self.is_connected, self.peers))

    def paths(self) -> dict[str, PathInfo]:
        """Return the way to each connected peer engine; of several pairs, one with a warning."""
        found: dict[str, PathInfo] = {}
        for (_, theirs), state in self._states.items():
            if state.path is None or not state.connected:
                continue
            known = found.get(theirs.engine)
            if known is None or (state.path.warning and not known.warning):
                found[theirs.engine] = state.path
        return found

    def is_complete(self) -> bool:
        """Whether every known peer engine is connected."""
        return self.connected() == len(self.peers)

    def failure(self, now: float, patience_s: float) -> str | None:
        """Return the reason of a pair that has failed and not recovered for `patience_s`."""
        for pair, since in self._failing_since.items():
            if now - since >= patience_s:
                return f"{pair[0]} cannot reach {pair[1]}: {self._states[pair].reason}"
        return None

    def describe_missing(self) -> str:
        """Return the pairs that are not connected, with the last reason of each."""
        missing = []
        for peer in self.peers.values():
            for pair in self.pairs(peer):
                state = self._states.get(pair)
                if state is None:
                    missing.append(f"{pair[0]} - {pair[1]}: nothing heard")
                elif not state.connected:
                    missing.append(f"{pair[0]} - {pair[1]}: {state.reason}")
        return "; ".join(missing)

    def _keep(self, table: dict[Pair, Bundle], pair: Pair, bundle: Bundle) -> bool:
        if not self._is_known(pair):
            log.info("dropped a bundle %s -> %s: not of a living pair", *map(repr, pair))
            return False
        table[pair] = bundle
        return True

    def _is_known(self, pair: Pair) -> bool:
        mine, theirs = pair
        peer = self.peers.get(theirs.engine)
        return mine in self.workers() and peer is not None and theirs in _workers(peer)

    def _forget(self, peer: EngineHello) -> None:
        for table in (self._offers, self._received, self._states, self._failing_since):
            for pair in [pair for pair in table if pair[1].engine == peer.engine]:
                del table[pair]


def _workers(hello: EngineHello) -> list[WorkerId]:
    return [WorkerId(hello.engine, rank, hello.incarnation) for rank in range(hello.tp_size)]


def _peer_up(peer: EngineHello) -> PeerUp:
    return PeerUp(peer.engine, peer.incarnation, peer.tp_size)
