# SPDX-License-Identifier: Apache-2.0
"""Connections of one vLLM worker to the workers of the other role.

One endpoint a peer at a time. A connection is usable once a probe write was verified end to end;
the prefill side probes, and the prefill side reconnects when a connection between two living
engines was lost. All methods run under the runtime's lock.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rdma_kv_cache import _native
from rdma_kv_cache.connector.compatibility import first_difference
from rdma_kv_cache.connector.heads import slices, source_ranks, target_ranks
from rdma_kv_cache.connector.log import get_logger
from rdma_kv_cache.connector.messages import PROBE_IMM, Hello, Probe, ProbeResult
from rdma_kv_cache.protocol.bootstrap import Bundle, PathInfo, PeerState, WorkerId
from rdma_kv_cache.protocol.codec import ProtocolError, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from rdma_kv_cache.connector.heads import Slice
    from rdma_kv_cache.connector.memory import KVMemory, Page
    from rdma_kv_cache.connector.messages import PeerMessage, RemoteLayer
    from rdma_kv_cache.protocol.bootstrap import FromWorker

logger = get_logger(__name__)

PROBE_BYTES = 4096
RECONNECT_FIRST_S = 0.5
RECONNECT_MAX_S = 15.0


@dataclass
class Peer:
    """One worker of the other role, and the endpoint that leads to it.

    `slices[l]`: what goes over this connection of each page of layer l (None: nothing).
    `fan_out`: decode ranks of its engine that this prefill worker has something for.
    """

    worker: WorkerId
    native: int
    attempt: int
    probe: Page
    probe_memory: _native.LocalMemory
    remote: Hello | None = None
    slices: list[Slice | None] = field(default_factory=list)
    fan_out: int = 1
    usable: bool = False
    probe_landed: bool = False
    probe_checksum: int | None = None


class Peers:
    """The table of peers, keyed by worker and by the engine's peer number."""

    def __init__(
        self,
        me: WorkerId,
        tp_size: int,
        engine: _native.Engine,
        memory: KVMemory,
        probes: bool,
        describe: Callable[[], tuple[list[bytes], dict[str, str], list[RemoteLayer]]],
        send_to_rank: Callable[[FromWorker], None],
    ) -> None:
        self._me = me
        self._tp_size = tp_size
        self._engine = engine
        self._memory = memory
        self._probes = probes
        self._describe = describe
        self._send_to_rank = send_to_rank
        self._by_worker: dict[WorkerId, Peer] = {}
        self._by_native: dict[int, Peer] = {}
        self._retries: dict[WorkerId, tuple[float, int]] = {}
        self.probes = 0

    def find(self, engine: str, tp_rank: int) -> Peer | None:
        """The usable peer that is this TP rank of this engine, in whichever incarnation lives."""
        for worker, peer in self._by_worker.items():
            if (worker.engine, worker.tp_rank) == (engine, tp_rank) and peer.usable:
                return peer
        return None

    def sources(self, engine: str) -> list[Peer]:
        """The prefill workers of this engine that have something for this decode worker.

        Raises ValueError naming one without a usable connection.
        """
        tp_size = next(
            (
                peer.remote.tp_size
                for worker, peer in self._by_worker.items()
                if worker.engine == engine and peer.remote is not None
            ),
            None,
        )
        if tp_size is None:
            raise ValueError(f"no connection to {engine}")
        found = []
        layers = self._describe()[2]
        for rank in sorted(source_ranks(layers, tp_size, self._tp_size, self._me.tp_rank)):
            peer = self.find(engine, rank)
            if peer is None:
                raise ValueError(f"no connection to {engine}/{rank}")
            found.append(peer)
        return found

    def by_native(self, native: int) -> Peer | None:
        """The peer with this native number; None after it was closed."""
        return self._by_native.get(native)

    def send(self, peer: Peer, message: PeerMessage) -> None:
        """Send a message; one to a peer that was just lost is dropped, as the wire would."""
        if self._by_native.get(peer.native) is not peer:
            return
        try:
            self._engine.send(peer.native, encode(message))
        except RuntimeError as error:
            logger.debug("%s to %s: %s", type(message).__name__, peer.worker, error)

    # Life of a connection

    def peer_up(self, engine: str, incarnation: int, tp_size: int) -> list[Peer]:
        """An engine (re)appeared: offer it an endpoint. Returns the peers that this ended."""
        stale = [
            p
            for w, p in self._by_worker.items()
            if w.engine == engine and w.incarnation != incarnation
        ]
        for peer in stale:
            self.close(peer, "the engine was restarted")
        for tp_rank in range(tp_size):
            worker = WorkerId(engine, tp_rank, incarnation)
            if worker not in self._by_worker:
                self._offer(worker, attempt=0)
        return stale

    def peer_down(self, engine: str, incarnation: int, reason: str) -> list[Peer]:
        """An incarnation is gone. Returns the peers that this ended."""
        gone = [
            p
            for w, p in self._by_worker.items()
            if (w.engine, w.incarnation) == (engine, incarnation)
        ]
        for peer in gone:
            self.close(peer, reason)
        for worker in [w for w in self._retries if w.engine == engine]:
            del self._retries[worker]
        return gone

    def bundle(self, bundle: Bundle) -> list[Peer]:
        """Connect to what a peer offers. Returns the peers that this ended."""
        worker, ended = bundle.sender, list[Peer]()
        try:
            hello: Hello = decode(bundle.payload, Hello)
        except ProtocolError as error:
            logger.warning("bundle of %s refused: %s", worker, error)
            return ended
        peer = self._by_worker.get(worker)
        if peer is not None and hello.attempt > peer.attempt:
            ended.append(peer)
            self.close(peer, "the peer reconnects")
            peer = None
        if peer is None:
            peer = self._offer(worker, hello.attempt)
        if peer.remote is not None or hello.attempt < peer.attempt:
            return ended
        difference = first_difference(self._describe()[1], hello.compatibility)
        if difference is not None:
            self.close(peer, f"incompatible engines: {difference}")
            return ended
        try:
            self._divide(peer, hello)
            self._engine.connect(peer.native, hello.endpoint, hello.memory)
        except ValueError as error:
            self.close(peer, str(error))
            return ended
        peer.remote = hello
        return ended

    def _divide(self, peer: Peer, hello: Hello) -> None:
        """Find what goes over this connection. Raises ValueError if pages cannot be cut so."""
        here = (self._describe()[2], self._tp_size, self._me.tp_rank)
        there = (hello.layers, hello.tp_size, peer.worker.tp_rank)
        prefill, decode = (here, there) if self._probes else (there, here)
        peer.slices = slices(*prefill, *decode)
        peer.fan_out = len(target_ranks(hello.layers, prefill[1], decode[1], prefill[2]))

    def lost(self, native: int, reason: str) -> Peer | None:
        """The engine lost (and fenced) a connection. Returns the peer that this ended."""
        peer = self._by_native.get(native)
        if peer is None:
            return None
        self.close(peer, reason)
        if self._probes:
            self._retry_later(peer)
        return peer

    def close(self, peer: Peer, reason: str) -> None:
        """Fence a peer off: when this returns nothing from it can land any more."""
        if self._by_native.pop(peer.native, None) is None:
            return
        del self._by_worker[peer.worker]
        self._engine.close_peer(peer.native)
        peer.probe_memory.close()
        peer.usable = False
        logger.warning("peer %s closed: %s", peer.worker, reason)
        self._send_to_rank(PeerState(self._me, peer.worker, connected=False, reason=reason))

    def tick(self, now: float) -> None:
        """Reconnect what is due."""
        for worker, (due, attempt) in list(self._retries.items()):
            if due <= now and worker not in self._by_worker:
                self._offer(worker, attempt)

    # The probe: a page that is written, signalled and told apart from any stale content

    def connected(self, native: int) -> None:
        """Both ends are up; the prefill side writes the probe."""
        peer = self._by_native.get(native)
        if peer is None or peer.remote is None or not self._probes:
            return
        peer.probe.fill(secrets.token_bytes(PROBE_BYTES))
        source, target = _int64(peer.probe.address), _int64(peer.remote.probe_address)
        self._engine.write(native, source, target, _int64(PROBE_BYTES), PROBE_IMM)
        self.probes += 1
        self.send(peer, Probe(self._checksum(peer.probe)))

    def probe_written(self, peer: Peer) -> None:
        """The probe's signal arrived."""
        peer.probe_landed = True
        self._answer_probe(peer)

    def probe_announced(self, peer: Peer, probe: Probe) -> None:
        """The checksum of the probe arrived."""
        peer.probe_checksum = probe.checksum
        self._answer_probe(peer)

    def probe_result(self, peer: Peer, result: ProbeResult) -> None:
        """The peer compared the probe."""
        if result.ok:
            self._usable(peer)
        else:
            self.lost(peer.native, "the probe write arrived damaged")

    def _answer_probe(self, peer: Peer) -> None:
        if not peer.probe_landed or peer.probe_checksum is None:
            return
        ok = self._checksum(peer.probe) == peer.probe_checksum
        self.send(peer, ProbeResult(ok))
        if ok:
            self._usable(peer)

    def _usable(self, peer: Peer) -> None:
        peer.usable = True
        self._retries.pop(peer.worker, None)
        native = self._engine.peer_path(peer.native)
        path = PathInfo(native.backend, native.description, native.warning)
        logger.info("peer %s connected, probe verified: %s", peer.worker, path.description)
        if path.warning:
            logger.warning("peer %s: slow path: %s", peer.worker, path.warning)
        self._send_to_rank(PeerState(self._me, peer.worker, connected=True, path=path))

    def _offer(self, worker: WorkerId, attempt: int) -> Peer:
        # Of the KV cache's kind: the probe takes the way that pages take.
        probe = self._memory.page(PROBE_BYTES)
        probe_memory = self._engine.register_memory(probe.address, PROBE_BYTES, self._memory.kind)
        endpoint = self._engine.create_endpoint(str(worker))
        peer = Peer(worker, endpoint.peer, attempt, probe, probe_memory)
        self._by_worker[worker] = self._by_native[peer.native] = peer
        memory, compatibility, layers = self._describe()
        hello = Hello(
            endpoint=endpoint.descriptor,
            memory=[*memory, probe_memory.descriptor],
            compatibility=compatibility,
            layers=layers,
            probe_address=probe.address,
            tp_size=self._tp_size,
            attempt=attempt,
        )
        self._send_to_rank(Bundle(self._me, worker, encode(hello)))
        return peer

    def _checksum(self, page: Page) -> int:
        sums = _native.checksum(_int64(page.address), _int64(PROBE_BYTES), self._memory.kind)
        return int(sums[0])

    def _retry_later(self, peer: Peer) -> None:
        _, attempt = self._retries.get(peer.worker, (0.0, peer.attempt))
        attempt = max(attempt, peer.attempt) + 1
        wait = min(RECONNECT_MAX_S, RECONNECT_FIRST_S * 2 ** min(attempt - 1, 10))
        self._retries[peer.worker] = (time.monotonic() + wait, attempt)


def _int64(value: int) -> npt.NDArray[np.int64]:
    return np.array([value], dtype=np.int64)
