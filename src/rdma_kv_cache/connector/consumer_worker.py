# SPDX-License-Identifier: Apache-2.0
"""Worker side of a decode engine: asks for pages and reports each request exactly once.

What a prefill rank gives ends in one of four ways: its signal arrived, it refused or confirmed a
cancel, or it was fenced off. A load is reported when this is so for all ranks that it comes from,
so nothing can still be written into its blocks.
All methods run under the runtime's lock.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rdma_kv_cache import _native
from rdma_kv_cache.connector.log import get_logger
from rdma_kv_cache.connector.messages import (
    Cancel,
    Cancelled,
    Checksums,
    Refused,
    Register,
    Release,
    Renew,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdma_kv_cache.connector.layout import KVLayout
    from rdma_kv_cache.connector.memory import KVMemory
    from rdma_kv_cache.connector.metadata import Load, RemoteTransfer, StepMetadata
    from rdma_kv_cache.connector.peers import Peer, Peers
    from rdma_kv_cache.connector.settings import Settings
    from rdma_kv_cache.connector.stats import TransferStats

logger = get_logger(__name__)

MAX_EPOCH = 2**32 - 1
"""An epoch is an immediate value of 32 bits."""

RENEWALS_PER_LEASE = 3


@dataclass
class Part:
    """What one prefill rank gives; `ended` means that nothing of it can land any more."""

    peer: Peer
    signalled: bool = False
    ended: bool = False
    pages_expected: int | None = None
    sums: list[Checksums] = field(default_factory=list)


@dataclass
class Incoming:
    """State of one load on the decode side; `failure` tells of the first part that failed."""

    load: Load
    parts: list[Part]
    epoch: int
    deadline: float
    aborted: bool = False
    cancelling: str | None = None
    failure: str | None = None

    def part_of(self, peer: Peer) -> Part | None:
        """The unfinished part that comes from this peer."""
        return next((part for part in self.parts if part.peer is peer and not part.ended), None)


class ConsumerWorker:
    """All loads of one decode worker."""

    def __init__(
        self,
        peers: Peers,
        memory: KVMemory,
        layout: KVLayout,
        settings: Settings,
        stats: TransferStats,
        fence: Callable[[Peer, str], None],
    ) -> None:
        self._peers = peers
        self._memory = memory
        self._layout = layout
        self._settings = settings
        self._stats = stats
        self._fence = fence
        self._epoch = 0
        self._by_request: dict[str, Incoming] = {}
        self._by_epoch: dict[int, Incoming] = {}
        self._expected: dict[str, RemoteTransfer] = {}
        self._renew_at = 0.0
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._failed_blocks: set[int] = set()

    # From vLLM's step

    def begin_step(self, meta: StepMetadata) -> None:
        """Send what the scheduler decided."""
        for transfer in meta.expected:
            self._expected[transfer.transfer_id] = transfer
        for load in meta.loads:
            self._expected.pop(load.transfer_id, None)
            self._begin(load)
        for req_id in meta.cancels:
            if (incoming := self._by_request.get(req_id)) is not None:
                incoming.aborted = True
                self._start_cancel(incoming, "the request was aborted")
        for transfer in meta.releases:
            self._expected.pop(transfer.transfer_id, None)
            self._tell(transfer.engine, Release(transfer.transfer_id))

    def take_finished(self) -> tuple[set[str], set[str]]:
        """(ended, those of them to be reported as failed); each request is returned once."""
        finished, self._finished = self._finished, set()
        failed, self._failed = self._failed, set()
        return finished, failed

    def take_failed_blocks(self) -> set[int]:
        """Blocks without valid KV, reported no later than their request's end."""
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    def held(self) -> int:
        """Requests whose blocks wait for KV."""
        return len(self._by_request)

    # From the peer

    def on_signal(self, peer: Peer, epoch: int) -> None:
        """Every write of this peer for this epoch has landed. A dead epoch's is ignored."""
        incoming = self._by_epoch.get(epoch)
        if incoming is not None and (part := incoming.part_of(peer)) is not None:
            part.signalled = True
            self._check(incoming, part)

    def on_message(self, peer: Peer, message: Refused | Cancelled | Checksums) -> None:
        """REFUSED, CANCELLED or CHECKSUMS; one for a dead epoch is ignored."""
        incoming = self._by_epoch.get(message.epoch)
        if incoming is None or (part := incoming.part_of(peer)) is None:
            return
        if isinstance(message, Refused):
            self._part_ended(incoming, part, f"prefill refused: {message.reason}")
        elif isinstance(message, Cancelled):
            self._part_ended(incoming, part, incoming.cancelling or "prefill cancelled it")
        else:
            part.sums.append(message)
            part.pages_expected = message.total_pages or part.pages_expected
            self._check(incoming, part)

    def on_peer_lost(self, peer: Peer) -> None:
        """The peer is fenced: nothing of it can land any more."""
        for incoming in list(self._by_epoch.values()):
            if (part := incoming.part_of(peer)) is not None:
                reason = incoming.cancelling or "its prefill engine is gone"
                self._part_ended(incoming, part, reason)

    def tick(self, now: float) -> None:
        """Deadlines and lease renewals."""
        for incoming in list(self._by_epoch.values()):
            if now < incoming.deadline:
                continue
            if incoming.cancelling is None:
                self._start_cancel(
                    incoming, f"no KV within {self._settings.transfer_timeout_s:.0f} s"
                )
            else:
                # Ends all loads of this peer through on_peer_lost.
                for part in [part for part in incoming.parts if not part.ended]:
                    self._fence(
                        part.peer,
                        f"CANCEL was not confirmed within {self._settings.cancel_timeout_s:.0f} s",
                    )
        if now >= self._renew_at:
            self._renew_at = now + self._settings.lease_s / RENEWALS_PER_LEASE
            self._renew()

    # One load

    def _begin(self, load: Load) -> None:
        self._epoch = self._epoch % MAX_EPOCH + 1
        try:
            peers = self._peers.sources(load.engine)
        except ValueError as error:
            self._end(load, str(error))
            return
        if any(load.incarnation not in (None, peer.worker.incarnation) for peer in peers):
            self._end(load, f"{load.engine} was restarted since it computed this prompt")
            return
        deadline = time.monotonic() + self._settings.transfer_timeout_s
        incoming = Incoming(load, [Part(peer) for peer in peers], self._epoch, deadline)
        self._by_request[load.req_id] = self._by_epoch[incoming.epoch] = incoming
        blocks = [list(ids) for ids in load.block_ids]
        register = Register(load.transfer_id, incoming.epoch, load.prompt_tokens, blocks)
        for peer in peers:
            self._peers.send(peer, register)

    def _start_cancel(self, incoming: Incoming, reason: str) -> None:
        if incoming.cancelling is not None:
            return
        incoming.cancelling = reason
        incoming.deadline = time.monotonic() + self._settings.cancel_timeout_s
        for part in incoming.parts:
            if not part.ended:
                self._peers.send(part.peer, Cancel(incoming.load.transfer_id, incoming.epoch))

    def _check(self, incoming: Incoming, part: Part) -> None:
        """The signal is here; in checksum mode the pages are compared first."""
        if not part.signalled:
            return
        if self._settings.checksum:
            received = sum(len(m.sums) // 8 for m in part.sums)
            if part.pages_expected is None or received < part.pages_expected:
                return
            damaged = self._damaged_pages(part.sums)
            if damaged:
                reason = f"{damaged} of {received} pages differ from their checksum"
                self._part_ended(incoming, part, reason)
                return
            self._stats.add("checksum_pages", received)
        self._part_ended(incoming, part, None)

    def _part_ended(self, incoming: Incoming, part: Part, failure: str | None) -> None:
        """One rank has given its heads, or failed: the others' are of no use then."""
        part.ended = True
        incoming.failure = incoming.failure or failure
        if not all(other.ended for other in incoming.parts):
            if failure is not None:
                self._start_cancel(incoming, failure)
            return
        del self._by_request[incoming.load.req_id]
        del self._by_epoch[incoming.epoch]
        if incoming.failure is None or incoming.aborted:
            self._finished.add(incoming.load.req_id)
        else:
            self._end(incoming.load, incoming.failure)

    def _damaged_pages(self, messages: list[Checksums]) -> int:
        addresses = np.frombuffer(b"".join(m.addresses for m in messages), dtype=np.int64)
        sizes = np.frombuffer(b"".join(m.sizes for m in messages), dtype=np.int64)
        sums = np.frombuffer(b"".join(m.sums for m in messages), dtype=np.uint64)
        inside = np.zeros(len(addresses), dtype=np.bool_)
        for base, nbytes in self._layout.storages:
            inside |= (addresses >= base) & (sizes >= 0) & (addresses + sizes <= base + nbytes)
        # Addresses come from the peer: what is not ours is damage, and must not be read.
        found = _native.checksum(addresses[inside], sizes[inside], self._memory.kind)
        return int((~inside).sum() + (found != sums[inside]).sum())

    def _end(self, load: Load, reason: str) -> None:
        """Report a load without KV in the shape that fits one or several KV cache groups."""
        logger.warning(
            "request %s: KV of transfer %s not loaded: %s", load.req_id, load.transfer_id, reason
        )
        self._stats.add("transfers_failed", 1)
        if len(load.block_ids) == 1:
            self._failed_blocks.update(load.block_ids[0])
        else:
            self._failed.add(load.req_id)
        self._finished.add(load.req_id)

    def _renew(self) -> None:
        by_engine: dict[str, list[str]] = {}
        for transfer in self._expected.values():
            by_engine.setdefault(transfer.engine, []).append(transfer.transfer_id)
        for engine, transfer_ids in by_engine.items():
            self._tell(engine, Renew(transfer_ids))

    def _tell(self, engine: str, message: Release | Renew) -> None:
        """Send to the ranks that loads come from; without a connection it is of no use."""
        with contextlib.suppress(ValueError):
            for peer in self._peers.sources(engine):
                self._peers.send(peer, message)
