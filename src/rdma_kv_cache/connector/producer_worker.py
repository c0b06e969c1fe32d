# SPDX-License-Identifier: Apache-2.0
"""Worker side of a prefill engine: writes pages as soon as both sides know of the transfer.

One mechanism: whenever a layer is computed or a REGISTER arrives, everything that is final and not
yet sent is written. On a GPU 'computed' means launched: a *mark* of the engine stands behind a
layer's kernels in their stream, and every write of its pages names the mark that it has to wait
for. All methods but `has_chunks`, `awaits_gpu` and `mark` run under the runtime's lock.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

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
from rdma_kv_cache.connector.outgoing import Outgoing
from rdma_kv_cache.connector.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rdma_kv_cache.connector.layout import KVLayout
    from rdma_kv_cache.connector.memory import KVMemory
    from rdma_kv_cache.connector.metadata import PrefillEnd, StepMetadata
    from rdma_kv_cache.connector.outgoing import Delivery, PageWrites
    from rdma_kv_cache.connector.peers import Peer, Peers
    from rdma_kv_cache.connector.settings import Settings
    from rdma_kv_cache.connector.stats import TransferStats

logger = get_logger(__name__)

MAX_REMEMBERED_ENDS = 10_000
"""Transfers whose end is remembered, so that a late REGISTER is refused at once."""

LOOK_AGAIN_S = 50e-6
"""Pause between two looks at a mark that checksum mode waits for."""


class ProducerWorker:
    """All transfers of one prefill worker."""

    def __init__(
        self,
        engine: _native.Engine,
        memory: KVMemory,
        peers: Peers,
        layout: KVLayout,
        settings: Settings,
        stats: TransferStats,
    ) -> None:
        self._engine = engine
        self._memory = memory
        self._peers = peers
        self._layout = layout
        self._settings = settings
        self._stats = stats
        self._by_request: dict[str, Outgoing] = {}
        self._by_transfer: dict[str, Outgoing] = {}
        self._by_write: dict[int, Delivery] = {}
        self._early: dict[str, list[tuple[Peer, Register]]] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._finished: set[str] = set()
        self._step: list[tuple[Outgoing, int]] = []
        # In the order of their marks: writes that wait for the GPU, and prefills whose last layer
        # is launched.
        self._gated: deque[tuple[int, int]] = deque()
        self._launched: deque[tuple[int, Outgoing]] = deque()
        self._looked_at = time.monotonic()
        self._trace = Trace(settings.trace_file, layout)
        self._layer_index = {layer.name: i for i, layer in enumerate(layout.layers)}

    # From vLLM's step

    def begin_step(self, meta: StepMetadata) -> None:
        """Learn which tokens this step computes, and which requests ended."""
        self._step = []
        for chunk in meta.chunks:
            out = self._by_request.get(chunk.req_id)
            if out is None:
                out = self._begin(chunk.req_id, chunk.transfer_id, chunk.prompt_tokens)
            out.add_chunk(chunk)
            self._step.append((out, chunk.computed_after))
        for end in meta.ends:
            self._prefill_ended(end)

    @property
    def has_chunks(self) -> bool:
        """Whether the running step computes KV that is to be sent."""
        return bool(self._step)

    def mark(self) -> int:
        """A mark behind all kernels that this thread has launched; 0 where there is no stream."""
        stream = self._memory.stream()
        return 0 if stream is None else self._engine.mark(stream)

    def layer_computed(self, layer_name: str, mark: int = 0) -> None:
        """A layer of the running step is done once `mark` is reached: its pages can go while the
        next one computes."""
        index = self._layer_index.get(layer_name)
        if index is None:
            return
        for out, computed in self._step:
            out.layer_done(index, computed, mark)
            if computed >= out.prompt_tokens and out.is_computed():
                self._note_computed(out, mark)
            self._flush_all(out, (index,))

    def end_step(self) -> None:
        """Completeness sweep: what no layer hook announced (a whole model in one CUDA graph has no
        hooks) is final by now, or once one mark for all of it is reached."""
        mark = 0
        for out, computed in self._step:
            missing = out.layers_behind(computed)
            if len(missing) == 0:
                continue
            mark = mark or self.mark()
            for index in missing:
                out.layer_done(index, computed, mark)
            if computed >= out.prompt_tokens:
                self._note_computed(out, mark)
            self._flush_all(out, missing)
        self._step = []

    def in_flight(self, req_ids: Iterable[str]) -> bool:
        """True while a write that reads these requests' blocks is not acknowledged."""
        return any(o.is_in_flight() for r in req_ids if (o := self._by_request.get(r)) is not None)

    def peers_of(self, req_ids: Iterable[str]) -> list[Peer]:
        """The peers that these requests are sent to."""
        outs = [o for r in req_ids if (o := self._by_request.get(r)) is not None]
        return [delivery.peer for out in outs for delivery in out.deliveries.values()]

    def preempt(self, req_ids: Iterable[str]) -> None:
        """These requests lose their blocks; nothing of them is in flight."""
        for req_id in req_ids:
            if (out := self._by_request.get(req_id)) is not None:
                out.restart()

    def take_finished(self) -> set[str]:
        """Requests whose blocks may be freed now; each is returned once."""
        finished, self._finished = self._finished, set()
        return finished

    def held(self) -> int:
        """Requests whose blocks are held although their prefill has ended."""
        return sum(out.end is not None for out in self._by_request.values())

    # From the peer

    def on_message(self, peer: Peer, message: Register | Cancel | Release | Renew) -> None:
        """REGISTER, CANCEL, RELEASE or RENEW."""
        if isinstance(message, Register):
            self._register(peer, message)
        elif isinstance(message, Cancel):
            self._cancel(peer, message)
        elif isinstance(message, Release):
            self._early.pop(message.transfer_id, None)
            self._give_up(message.transfer_id, "decode released it")
        else:
            until = time.monotonic() + self._settings.lease_s
            for transfer_id in message.transfer_ids:
                if (out := self._by_transfer.get(transfer_id)) is not None:
                    out.lease_until = until

    def on_written(self, write_id: int, ok: bool) -> None:
        """A write was acknowledged, or failed together with its peer."""
        delivery = self._by_write.pop(write_id, None)
        if delivery is None:
            return
        out = delivery.out
        delivery.in_flight.discard(write_id)
        out.write_ended(write_id, time.monotonic())
        self._trace.ended(write_id, ok)
        if not delivery.in_flight and ok and not out.closed and delivery.all_sent():
            delivery.delivered = True
            if out.all_registered() and all(d.delivered for d in out.deliveries.values()):
                self._delivered(out)
        self._finish_if_done(out)

    def on_peer_lost(self, peer: Peer) -> None:
        """The peer is fenced: what was meant for it needs no write any more."""
        for transfer_id, waiting in list(self._early.items()):
            self._early[transfer_id] = [entry for entry in waiting if entry[0] is not peer]
            if not self._early[transfer_id]:
                del self._early[transfer_id]
        for out in list(self._by_transfer.values()):
            delivery = out.deliveries.get(peer.native)
            if delivery is not None and delivery.peer is peer:
                self._give_up(out.transfer_id, "its decode engine is gone")

    def tick(self, now: float) -> None:
        """Look how far the GPU is, and end leases: blocks are never held for a decode engine that
        does not come."""
        self._look_at_gpu(now)
        for out in list(self._by_transfer.values()):
            is_asked_for = out.closed or out.all_registered()
            if not is_asked_for and out.end is not None and out.lease_until <= now:
                logger.warning(
                    "transfer %s: no REGISTER within the lease of %.0f s, blocks released",
                    out.transfer_id, self._settings.lease_s,
                )  # fmt: skip
                self._give_up(out.transfer_id, "its lease ran out")

    # The GPU's progress

    @property
    def awaits_gpu(self) -> bool:
        """Whether a layer is launched whose end matters to a figure."""
        return bool(self._gated or self._launched)

    def _look_at_gpu(self, now: float) -> None:
        while self._gated and self._engine.reached(self._gated[0][0]):
            _, write_id = self._gated.popleft()
            if (delivery := self._by_write.get(write_id)) is not None:
                delivery.out.write_began(write_id, now)
                self._trace.computed(write_id, now)
        while self._launched and self._engine.reached(self._launched[0][0]):
            _, out = self._launched.popleft()
            # It was reached since the last look: exposed time is never shown too small.
            out.computed_at = max(self._looked_at, out.launched_at)
        self._looked_at = now

    def _note_computed(self, out: Outgoing, mark: int) -> None:
        out.launched_at = time.monotonic()
        if mark:
            self._launched.append((mark, out))
        else:
            out.computed_at = out.launched_at

    def _wait_reached(self, mark: int) -> bool:
        """Wait for the GPU, at most `transfer_timeout_s`; False if that was not enough."""
        deadline = time.monotonic() + self._settings.transfer_timeout_s
        while mark and not self._engine.reached(mark):
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_AGAIN_S)
        return True

    # One transfer

    def _begin(self, req_id: str, transfer_id: str, prompt_tokens: int) -> Outgoing:
        out = Outgoing(req_id, transfer_id, prompt_tokens, self._layout)
        self._by_request[req_id] = self._by_transfer[transfer_id] = out
        if transfer_id in self._ended:
            out.closed = True
        for early in self._early.pop(transfer_id, ()):
            self._register(*early)
        return out

    def _register(self, peer: Peer, message: Register) -> None:
        out = self._by_transfer.get(message.transfer_id)
        reason = self._ended.get(message.transfer_id)
        if reason is None and out is None:
            self._early.setdefault(message.transfer_id, []).append((peer, message))
            return
        if reason is None and out is not None:
            reason = self._aim(out, peer, message)
        if reason is not None:
            self._peers.send(peer, Refused(message.epoch, reason))

    def _aim(self, out: Outgoing, peer: Peer, message: Register) -> str | None:
        """Accept a REGISTER and send what is final already; returns why it is refused."""
        for other in out.deliveries.values():
            here, there = other.peer.worker, peer.worker
            ranks_of_one = (here.engine, here.incarnation) == (there.engine, there.incarnation)
            if not ranks_of_one or here.tp_rank == there.tp_rank:
                return "another decode engine registered for this transfer first"
        if out.prompt_tokens != message.prompt_tokens:
            return (
                f"the prompt has {out.prompt_tokens} tokens here and {message.prompt_tokens} at "
                "decode: different requests or tokenizers"
            )
        try:
            delivery = out.add_target(peer, message.epoch, message.block_ids, time.monotonic())
        except ValueError as error:
            return str(error)
        self._flush(delivery, range(len(self._layout.layers)))
        return None

    def _flush_all(self, out: Outgoing, layers: Sequence[int]) -> None:
        for delivery in tuple(out.deliveries.values()):
            self._flush(delivery, layers)

    def _flush(self, delivery: Delivery, layers: Iterable[int]) -> None:
        out, peer = delivery.out, delivery.peer
        try:
            parts = delivery.take_writes(layers, self._engine.reached)
        except ValueError as error:
            self._fail(out, str(error))
            return
        if not parts:
            return
        if self._settings.checksum and not all(self._send_checksums(delivery, w) for w in parts):
            return
        complete = delivery.all_sent()
        try:
            for writes in parts:
                is_last = complete and writes is parts[-1]
                self._post(delivery, writes, delivery.epoch if is_last else None)
            delivery.signalled = complete
        except ValueError as error:
            # Block ids outside decode's memory: a wrong REGISTER must not end this engine.
            self._fail(out, f"write to {peer.worker}: {error}")
        except RuntimeError as error:
            # The peer was lost a moment ago; its PEER_LOST event is still to be read.
            logger.debug("transfer %s: %s", out.transfer_id, error)

    def _post(self, delivery: Delivery, writes: PageWrites, imm: int | None) -> None:
        write_id = self._engine.write(
            delivery.peer.native,
            writes.source,
            writes.destination,
            writes.nbytes,
            imm,
            writes.after,
        )
        delivery.in_flight.add(write_id)
        self._by_write[write_id] = delivery
        self._trace.posted(write_id, delivery.out, writes)
        if writes.after:
            self._gated.append((writes.after, write_id))
        else:
            delivery.out.write_began(write_id, time.monotonic())
        self._stats.add("bytes", writes.total_bytes)
        self._stats.add("descriptors", len(writes.nbytes))

    def _send_checksums(self, delivery: Delivery, writes: PageWrites) -> bool:
        """Tell decode what the pages contain; False if the GPU did not come to compute them."""
        if not self._wait_reached(writes.after):
            limit = self._settings.transfer_timeout_s
            reason = f"rdma.checksum: the GPU did not end a layer within {limit:g} s"
            self._fail(delivery.out, reason)
            return False
        sums = _native.checksum(writes.source, writes.nbytes, self._memory.kind)
        message = Checksums(
            epoch=delivery.epoch,
            addresses=writes.destination.tobytes(),
            sizes=writes.nbytes.tobytes(),
            sums=sums.tobytes(),
            total_pages=delivery.pages_posted if delivery.all_sent() else 0,
        )
        self._peers.send(delivery.peer, message)
        return True

    def _delivered(self, out: Outgoing) -> None:
        now = time.monotonic()
        if out.computed_at is None:
            # Its last write is acknowledged, so it was computed since the last look.
            out.computed_at = max(self._looked_at, out.launched_at)
        registered_at = max(delivery.registered_at for delivery in out.deliveries.values())
        visible_from = max(registered_at, out.computed_at)
        self._stats.add("transfers", 1)
        self._stats.add("busy_seconds", out.busy_s)
        self._stats.add("exposed_seconds", min(out.busy_s, max(0.0, now - visible_from)))
        self._close(out, "it was delivered")

    def _prefill_ended(self, end: PrefillEnd) -> None:
        out = self._by_request.get(end.req_id)
        if out is None or not end.held:
            self._refuse_unknown(end)
            return
        out.end = end
        out.lease_until = time.monotonic() + self._settings.lease_s
        if not end.complete and not out.closed:
            self._fail(out, "prefill was aborted")
        else:
            self._finish_if_done(out)

    def _refuse_unknown(self, end: PrefillEnd) -> None:
        """A request that never ran: whoever waits for it must not wait for the deadline."""
        self._remember(end.transfer_id, "prefill was aborted")
        for peer, register in self._early.pop(end.transfer_id, ()):
            self._peers.send(peer, Refused(register.epoch, "prefill was aborted"))

    def _cancel(self, peer: Peer, message: Cancel) -> None:
        waiting = self._early.pop(message.transfer_id, [])
        out = self._by_transfer.get(message.transfer_id)
        delivery = None if out is None else out.deliveries.get(peer.native)
        if delivery is not None and delivery.epoch == message.epoch:
            delivery.cancelled = True
            self._give_up(message.transfer_id, "decode cancelled it")
            return
        self._peers.send(peer, Cancelled(message.epoch))
        self._remember(message.transfer_id, "decode cancelled it")
        for other, register in waiting:
            if other is not peer:
                self._peers.send(other, Refused(register.epoch, "decode cancelled it"))
        if delivery is None:
            self._give_up(message.transfer_id, "decode cancelled it")

    def _fail(self, out: Outgoing, reason: str) -> None:
        """This engine cannot give the KV: whoever registered for it must know."""
        if out.deliveries and not out.closed:
            self._stats.add("transfers_failed", 1)
        self._give_up(out.transfer_id, reason)

    def _give_up(self, transfer_id: str, reason: str) -> None:
        """End the transfer for all decode ranks: a request that misses the heads of one rank is
        computed anew."""
        self._remember(transfer_id, reason)
        out = self._by_transfer.get(transfer_id)
        if out is None:
            return
        if not out.closed:
            for delivery in out.deliveries.values():
                delivery.refusal = None if delivery.cancelled else reason
        self._close(out, reason)
        self._finish_if_done(out)

    def _close(self, out: Outgoing, reason: str) -> None:
        out.closed = True
        self._remember(out.transfer_id, reason)
        # What waits for the GPU would keep the answer to a CANCEL until its step has run.
        for delivery in out.deliveries.values():
            if delivery.in_flight:
                self._engine.cancel(delivery.peer.native, list(delivery.in_flight))

    def _finish_if_done(self, out: Outgoing) -> None:
        """Answer and let go, once nothing is posted or in flight for this transfer."""
        if not out.closed:
            return
        for delivery in out.deliveries.values():
            if not delivery.in_flight:
                self._answer(delivery)
        if out.end is not None and not out.is_in_flight():
            self._by_transfer.pop(out.transfer_id, None)
            if self._by_request.pop(out.req_id, None) is not None:
                self._finished.add(out.req_id)

    def _answer(self, delivery: Delivery) -> None:
        if delivery.cancelled:
            self._peers.send(delivery.peer, Cancelled(delivery.epoch))
        elif delivery.refusal is not None:
            self._peers.send(delivery.peer, Refused(delivery.epoch, delivery.refusal))
        delivery.cancelled, delivery.refusal = False, None

    def _remember(self, transfer_id: str, reason: str) -> None:
        self._ended[transfer_id] = reason
        if len(self._ended) > MAX_REMEMBERED_ENDS:
            self._ended.popitem(last=False)
