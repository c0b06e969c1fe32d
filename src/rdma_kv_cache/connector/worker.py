# SPDX-License-Identifier: Apache-2.0
"""Worker side of the connector: the engine, its progress thread, and the two roles above them.

Two threads meet here under one lock: vLLM's forward thread (steps, layers) and ours (events of the
engine, deadlines). Nothing on the forward thread waits for the network, but for one bounded case:
blocks that vLLM takes back by preemption while a write still reads them. (In checksum mode it also
waits for the GPU, layer by layer.) Our thread holds the lock for a few events at a time, so that a
layer hook waits tens of microseconds at most.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

from rdma_kv_cache import _native
from rdma_kv_cache._native import EventKind
from rdma_kv_cache.connector.bootstrap_link import BootstrapLink
from rdma_kv_cache.connector.consumer_worker import ConsumerWorker
from rdma_kv_cache.connector.log import get_logger
from rdma_kv_cache.connector.memory import HostMemory
from rdma_kv_cache.connector.messages import (
    PROBE_IMM,
    Cancel,
    PeerMessage,
    Probe,
    ProbeResult,
    Register,
    Release,
    Renew,
)
from rdma_kv_cache.connector.peers import Peer, Peers
from rdma_kv_cache.connector.producer_worker import ProducerWorker
from rdma_kv_cache.connector.stats import HELD, TransferStats
from rdma_kv_cache.protocol.bootstrap import PeerDown, PeerUp, ToWorker, WorkerHello, WorkerId
from rdma_kv_cache.protocol.codec import ProtocolError, decode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdma_kv_cache.connector.layout import KVLayout
    from rdma_kv_cache.connector.memory import KVMemory
    from rdma_kv_cache.connector.messages import RemoteLayer
    from rdma_kv_cache.connector.metadata import StepMetadata
    from rdma_kv_cache.connector.settings import Settings

logger = get_logger(__name__)

TICK_S = 0.1
"""Longest time between two looks at deadlines."""

GPU_TICK_S = 0.001
"""The same while the GPU has not reached a layer whose pages are to go: the resolution of the time
figures on a GPU. A look costs 2 us of this thread."""

EVENTS_A_TURN = 16
"""Events handled under one hold of the lock."""


class ConnectorWorker:
    """One vLLM worker's part in all transfers."""

    def __init__(
        self,
        settings: Settings,
        layout: KVLayout,
        compatibility: dict[str, str],
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        memory: KVMemory | None = None,
        produces: bool,
        consumes: bool,
    ) -> None:
        """Register the KV memory and meet the engine rank. Raises on anything unusable."""
        self._settings = settings
        self._layout = layout
        self._compatibility = compatibility
        self._me = WorkerId(settings.engine, tp_rank, settings.incarnation)
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._stats = TransferStats()
        self._writes_reported = 0
        self._held_reported = -1
        self._failure: Exception | None = None
        memory = HostMemory() if memory is None else memory
        config = _engine_config(settings, memory.near(layout.storages[0][0]))
        self._engine = _native.Engine(config, settings.incarnation)
        logger.info("transport %s: %s", self._engine.backend, self._engine.description)
        # Only decode's KV blocks are written by peers; prefill's are read by its own NIC.
        self._memory = [
            self._engine.register_memory(base, nbytes, memory.kind, peer_writable=consumes)
            for base, nbytes in layout.storages
        ]
        self._link = BootstrapLink(
            settings.bootstrap_socket, settings.connect_timeout_s, self._on_bootstrap
        )
        self._peers = Peers(
            self._me, tp_size, self._engine, memory, produces, self._describe, self._link.send
        )
        self._producer = self._consumer = None
        if produces:
            self._producer = ProducerWorker(
                self._engine, memory, self._peers, layout, settings, self._stats
            )
        if consumes:
            self._consumer = ConsumerWorker(
                self._peers, memory, layout, settings, self._stats, self._fence
            )
        self._thread = threading.Thread(target=self._progress, name="rkv-connector", daemon=True)
        self._thread.start()
        role = "prefill" if produces else "decode"
        self._link.send(
            WorkerHello(self._me, role, os.getpid(), self._engine.backend, self._engine.description)
        )
        self._link.start()

    # vLLM's step

    def begin_step(self, meta: StepMetadata) -> None:
        """Before the forward pass, so that a REGISTER does not wait for it.

        Raises RuntimeError if a thread of the connector failed: the engine is then restarted.
        """
        with self._lock:
            if self._failure is not None:
                raise RuntimeError("RDMAConnector failed, see above") from self._failure
            if self._producer is not None:
                self._producer.begin_step(meta)
            if self._consumer is not None:
                self._consumer.begin_step(meta)

    def preempt(self, meta: StepMetadata) -> None:
        """Wait, within `cancel_timeout_s`, until nothing reads the blocks that vLLM takes back."""
        if self._producer is None or not meta.preempted:
            return
        deadline = time.monotonic() + self._settings.cancel_timeout_s
        while True:
            with self._lock:
                if not self._producer.in_flight(meta.preempted):
                    self._producer.preempt(meta.preempted)
                    return
                if time.monotonic() >= deadline:
                    for peer in self._producer.peers_of(meta.preempted):
                        self._fence(peer, "writes outlasted the preemption of their blocks")
                    self._producer.preempt(meta.preempted)
                    return
            time.sleep(0.001)

    def layer_computed(self, layer_name: str) -> None:
        """A layer's attention op returned: its KV of this step is in the pages, or will be as
        soon as the GPU has done what was launched so far."""
        # Only this thread changes the step, so most steps of a busy engine need no lock here.
        if self._producer is not None and self._producer.has_chunks:
            mark = self._producer.mark()
            with self._lock:
                self._producer.layer_computed(layer_name, mark)

    def end_step(self) -> None:
        """The forward pass is over, or launched."""
        if self._producer is not None and self._producer.has_chunks:
            with self._lock:
                self._producer.end_step()

    def take_finished(self) -> tuple[set[str], set[str], set[str]]:
        """(sent, received, those of them that failed), each request once."""
        with self._lock:
            sent = self._producer.take_finished() if self._producer is not None else set()
            received, failed = set[str](), set[str]()
            if self._consumer is not None:
                received, failed = self._consumer.take_finished()
            return sent, received, failed

    def take_failed_blocks(self) -> set[int]:
        """Blocks without valid KV."""
        with self._lock:
            return self._consumer.take_failed_blocks() if self._consumer is not None else set()

    def take_stats(self) -> TransferStats | None:
        """What happened since the last call, or None."""
        with self._lock:
            writes = int(self._engine.stats()["descriptors_out"]) - self._peers.probes
            if writes > self._writes_reported:
                self._stats.add("writes", writes - self._writes_reported)
                self._writes_reported = writes
            held = sum(side.held() for side in (self._producer, self._consumer) if side is not None)
            if held != self._held_reported:
                self._stats.data[HELD] = self._held_reported = held
            if self._stats.is_empty():
                return None
            report = TransferStats(self._stats.data)
            self._stats.reset()
            return report

    def shutdown(self) -> None:
        """End threads and connections; peers see a closed connection at once."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._link.close()
        self._thread.join(timeout=5)
        self._engine.close()

    # The two sources of events

    def _on_bootstrap(self, message: ToWorker) -> None:
        with self._lock, self._reported("bootstrap message"):
            if isinstance(message, PeerUp):
                ended = self._peers.peer_up(message.engine, message.incarnation, message.tp_size)
            elif isinstance(message, PeerDown):
                ended = self._peers.peer_down(message.engine, message.incarnation, message.reason)
            else:
                ended = self._peers.bundle(message)
            for peer in ended:
                self._on_peer_lost(peer)

    def _progress(self) -> None:
        while not self._stopping.is_set():
            awaits_gpu = self._producer is not None and self._producer.awaits_gpu
            self._engine.wait(GPU_TICK_S if awaits_gpu else TICK_S)
            events = self._engine.poll(EVENTS_A_TURN)
            with self._lock, self._reported("progress"):
                for event in events:
                    self._on_event(event)
                now = time.monotonic()
                self._peers.tick(now)
                if self._producer is not None:
                    self._producer.tick(now)
                if self._consumer is not None:
                    self._consumer.tick(now)

    @contextlib.contextmanager
    def _reported(self, where: str) -> Iterator[None]:
        """Keep an unexpected error of our threads for vLLM's next step, which it then ends."""
        try:
            yield
        except Exception as error:
            logger.exception("RDMAConnector: %s", where)
            self._failure = error

    def _on_event(self, event: _native.Event) -> None:
        kind, peer = event.kind, self._peers.by_native(event.peer)
        if kind in (EventKind.TRANSFER_DONE, EventKind.TRANSFER_FAILED):
            # Reported also for a peer that was closed here: its writes are over now.
            if self._producer is not None:
                self._producer.on_written(event.id, kind == EventKind.TRANSFER_DONE)
        elif peer is None:
            return
        elif kind == EventKind.CONNECTED:
            self._peers.connected(event.peer)
        elif kind == EventKind.PEER_LOST:
            self._peers.lost(event.peer, event.reason)
            self._on_peer_lost(peer)
        elif kind == EventKind.IMM:
            self._on_signal(peer, event.imm)
        elif kind == EventKind.MESSAGE:
            self._on_message(peer, event.data)

    def _on_signal(self, peer: Peer, imm: int) -> None:
        if imm == PROBE_IMM:
            self._peers.probe_written(peer)
        elif self._consumer is not None:
            self._consumer.on_signal(peer, imm)

    def _on_message(self, peer: Peer, data: bytes) -> None:
        try:
            message: PeerMessage = decode(data, PeerMessage)
        except ProtocolError as error:
            self._fence(peer, f"a message that is none: {error}")
            return
        if isinstance(message, Probe):
            self._peers.probe_announced(peer, message)
        elif isinstance(message, ProbeResult):
            self._peers.probe_result(peer, message)
        elif isinstance(message, (Register, Cancel, Release, Renew)):
            if self._producer is not None:
                self._producer.on_message(peer, message)
        elif self._consumer is not None:
            self._consumer.on_message(peer, message)

    def _fence(self, peer: Peer, reason: str) -> None:
        self._peers.lost(peer.native, reason)
        self._on_peer_lost(peer)

    def _on_peer_lost(self, peer: Peer) -> None:
        if self._producer is not None:
            self._producer.on_peer_lost(peer)
        if self._consumer is not None:
            self._consumer.on_peer_lost(peer)

    def _describe(self) -> tuple[list[bytes], dict[str, str], list[RemoteLayer]]:
        memory = [memory.descriptor for memory in self._memory if memory.descriptor]
        return memory, self._compatibility, self._layout.describe()


def _engine_config(settings: Settings, near: str) -> _native.EngineConfig:
    return _native.EngineConfig(
        backend=settings.backend,
        bind_host=settings.bind_host,
        devices=settings.devices,
        gid_index=settings.gid_index,
        near=near,
        traffic_class=settings.traffic_class,
        service_level=settings.service_level,
        block_size=settings.block_size,
        queue_depth=settings.queue_depth,
        qps_per_peer=settings.qps_per_peer,
        peer_timeout_s=settings.peer_timeout_s,
        connect_timeout_s=settings.connect_timeout_s,
        link=settings.link,
    )
