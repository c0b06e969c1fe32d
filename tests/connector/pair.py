# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode worker side in one process: real engines, real sockets, numpy KV memory.

The test plays what stands around them: vLLM's steps, and the ranks that carry bundles.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from rdma_kv_cache.connector.heads import held
from rdma_kv_cache.connector.layout import KVLayout, Layer
from rdma_kv_cache.connector.metadata import Load, PrefillChunk, PrefillEnd, StepMetadata
from rdma_kv_cache.connector.settings import Settings
from rdma_kv_cache.connector.worker import ConnectorWorker
from rdma_kv_cache.protocol.bootstrap import (
    Bundle,
    FromWorker,
    PeerState,
    PeerUp,
    WorkerHello,
)
from rdma_kv_cache.protocol.codec import FrameReader, decode, encode, frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS, BLOCK_TOKENS, PAGE_BYTES, NUM_BLOCKS = 3, 4, 256, 64
KV_HEADS = 4
LIMIT_S = 15.0


def until(check: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait for `check` to be true. Raises TimeoutError."""
    deadline = time.monotonic() + limit_s
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s} s: {what}")
        time.sleep(0.005)


class Rank:
    """The rank's end of one worker's bootstrap socket; bundles go to the worker that they are for,
    among those of `others`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.others: list[Rank] = []
        self.hello: WorkerHello | None = None
        self.states: list[PeerState] = []
        self.carry = True
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def send(self, message: PeerUp | Bundle) -> None:
        """Send to the worker."""
        assert self._connection is not None
        self._connection.sendall(frame(encode(message)))

    def connected(self) -> bool:
        """Whether the worker's last word on each peer is that it is usable."""
        last = {state.peer.tp_rank: state.connected for state in self.states}
        return len(last) >= len(self.others) and all(last.values())

    def _serve(self) -> None:
        self._connection, _ = self._listener.accept()
        reader = FrameReader()
        while data := self._connection.recv(1 << 16):
            for body in reader.feed(data):
                message = decode(body, FromWorker)
                if isinstance(message, WorkerHello):
                    self.hello = message
                elif isinstance(message, PeerState):
                    self.states.append(message)
                elif self.carry:
                    for other in self.others:
                        if other.hello is not None and other.hello.worker == message.receiver:
                            other.send(message)


class Side:
    """One worker with its KV memory: `kv[layer, block]` is one page.

    It holds its TP rank's part of KV_HEADS heads.
    """

    def __init__(
        self,
        folder: Path,
        engine: str,
        incarnation: int,
        *,
        prefill: bool,
        tp_rank: int = 0,
        tp_size: int = 1,
        head_major: bool = True,
        **settings: object,
    ) -> None:
        heads = len(held(KV_HEADS, tp_size, tp_rank))
        page = PAGE_BYTES * heads // KV_HEADS
        self.tp_size = tp_size
        self.kv = np.zeros((LAYERS, NUM_BLOCKS, page), dtype=np.uint8)
        base = self.kv.ctypes.data
        layers = tuple(
            Layer(f"l{i}", 0, base + i * NUM_BLOCKS * page, page, page, heads, KV_HEADS, head_major)
            for i in range(LAYERS)
        )
        self.layout = KVLayout(layers, (BLOCK_TOKENS,), NUM_BLOCKS, ((base, self.kv.nbytes),))
        self.rank = Rank(folder / f"{engine}-{incarnation}-{tp_rank}.sock")
        model = settings.pop("model", "m")
        values = {
            "peer_timeout_s": 1.0, "connect_timeout_s": 5.0, "cancel_timeout_s": 1.0,
            "transfer_timeout_s": 10.0, "lease_s": 10.0, **settings,
        }  # fmt: skip
        self.worker = ConnectorWorker(
            Settings(engine, incarnation, str(self.rank.path), **values),  # type: ignore[arg-type]
            self.layout,
            {"model": str(model)},
            tp_rank=tp_rank,
            tp_size=tp_size,
            produces=prefill,
            consumes=not prefill,
        )
        until(lambda: self.rank.hello is not None, "WorkerHello")

    def step(self, **meta: object) -> None:
        """One vLLM step: metadata in, all layers computed, end of step."""
        self.begin(**meta)
        for layer in self.layout.layers:
            self.worker.layer_computed(layer.name)
        self.worker.end_step()

    def begin(self, **meta: object) -> None:
        """The beginning of a step."""
        self.worker.begin_step(StepMetadata(**meta))  # type: ignore[arg-type]


def meet(prefill: Side, decode_side: Side) -> None:
    """Introduce the two, as their ranks do."""
    meet_all([prefill], [decode_side])


def meet_all(prefill: list[Side], decode_side: list[Side]) -> None:
    """Introduce the workers of two engines."""
    for here, there in ((prefill, decode_side), (decode_side, prefill)):
        for side in here:
            side.rank.others = [other.rank for other in there]
    for here, there in ((prefill, decode_side), (decode_side, prefill)):
        hello = there[0].rank.hello
        assert hello is not None
        for side in here:
            side.rank.send(PeerUp(hello.worker.engine, hello.worker.incarnation, len(there)))


def chunk(blocks: list[int], prompt: int, computed: int, transfer: str = "t") -> PrefillChunk:
    """A (first) chunk that computes `computed` of `prompt` tokens."""
    return PrefillChunk(f"p-{transfer}", transfer, prompt, computed, (blocks,), True)


def end(transfer: str = "t", *, complete: bool = True) -> PrefillEnd:
    """The end of the prefill request."""
    return PrefillEnd(f"p-{transfer}", transfer, complete, True)


def load(
    blocks: list[int], prompt: int, transfer: str = "t", incarnation: int | None = None
) -> Load:
    """Decode's wish."""
    return Load(f"d-{transfer}", transfer, "prefill-0", incarnation, prompt, (blocks,))
