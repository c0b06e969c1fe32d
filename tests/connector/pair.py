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
LIMIT_S = 15.0


def until(check: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait for `check` to be true. Raises TimeoutError."""
    deadline = time.monotonic() + limit_s
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s} s: {what}")
        time.sleep(0.005)


class Rank:
    """The rank's end of one worker's bootstrap socket; bundles go to the `other` rank's worker."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.other: Rank | None = None
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
        """Whether the worker's last word is that its peer is usable."""
        return bool(self.states) and self.states[-1].connected

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
                elif self.carry and self.other is not None:
                    self.other.send(message)


class Side:
    """One worker with its KV memory: `kv[layer, block]` is one page."""

    def __init__(
        self, folder: Path, engine: str, incarnation: int, *, prefill: bool, **settings: object
    ) -> None:
        self.kv = np.zeros((LAYERS, NUM_BLOCKS, PAGE_BYTES), dtype=np.uint8)
        base = self.kv.ctypes.data
        layers = tuple(
            Layer(f"l{i}", 0, base + i * NUM_BLOCKS * PAGE_BYTES, PAGE_BYTES, PAGE_BYTES)
            for i in range(LAYERS)
        )
        self.layout = KVLayout(layers, (BLOCK_TOKENS,), NUM_BLOCKS, ((base, self.kv.nbytes),))
        self.rank = Rank(folder / f"{engine}-{incarnation}.sock")
        model = settings.pop("model", "m")
        values = {
            "peer_timeout_s": 1.0, "connect_timeout_s": 5.0, "cancel_timeout_s": 1.0,
            "transfer_timeout_s": 10.0, "lease_s": 10.0, **settings,
        }  # fmt: skip
        self.worker = ConnectorWorker(
            Settings(engine, incarnation, str(self.rank.path), **values),  # type: ignore[arg-type]
            self.layout,
            {"model": str(model)},
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
    prefill.rank.other, decode_side.rank.other = decode_side.rank, prefill.rank
    for here, there in ((prefill, decode_side), (decode_side, prefill)):
        hello = there.rank.hello
        assert hello is not None
        here.rank.send(PeerUp(hello.worker.engine, hello.worker.incarnation, 1))


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
