# SPDX-License-Identifier: Apache-2.0
"""Two engines on GPU memory: one here, the other in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rdma_kv_cache import _native
from rdma_kv_cache._native import EventKind

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PATIENCE_S = 60.0


@dataclass
class End:
    """One engine with a tensor of device memory that its peer may write."""

    nbytes: int
    config: _native.EngineConfig
    device: int = 0
    tensor: torch.Tensor = field(init=False)
    seen: list[_native.Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.cuda.set_device(self.device)
        self.tensor = torch.zeros(self.nbytes, dtype=torch.uint8, device=f"cuda:{self.device}")
        torch.cuda.synchronize()
        self.engine = _native.Engine(self.config, incarnation=time.monotonic_ns())
        self.memory = self.engine.register_memory(self.tensor.data_ptr(), self.nbytes, "cuda")
        self.endpoint = self.engine.create_endpoint("peer")
        self.remote_base = 0

    def offer(self) -> tuple[bytes, bytes, int]:
        """What the other end must know."""
        return self.endpoint.descriptor, self.memory.descriptor, self.tensor.data_ptr()

    def connect(self, offer: tuple[bytes, bytes, int]) -> None:
        """Connect to what the other end offers."""
        endpoint, memory, self.remote_base = offer
        self.engine.connect(self.endpoint.peer, endpoint, [memory])
        self.expect(EventKind.CONNECTED)

    def expect(self, kind: EventKind, timeout_s: float = PATIENCE_S) -> _native.Event:
        """The next event of this kind; those before it are kept in `seen`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for i, event in enumerate(self.seen):
                if event.kind == kind:
                    return self.seen.pop(i)
            self.engine.wait(0.05)
            self.seen += self.engine.poll()
        raise TimeoutError(f"no {kind} within {timeout_s} s, only {self.seen}")

    def write(
        self, here: np.ndarray, there: np.ndarray, page: int, imm: int | None = None, after: int = 0
    ) -> int:
        """Queue copies of pages, by their offsets."""
        return self.engine.write(
            self.endpoint.peer,
            self.tensor.data_ptr() + here,
            self.remote_base + there,
            np.full(len(here), page, dtype=np.int64),
            imm,
            after,
        )


def _serve(pipe: Connection, nbytes: int, options: dict[str, Any], device: int) -> None:
    end = End(nbytes, _native.EngineConfig(**options), device)
    pipe.send(end.offer())
    end.connect(pipe.recv())
    pipe.send(end.engine.peer_path(end.endpoint.peer).description)
    while (order := pipe.recv()) is not None:
        name, *arguments = order
        if name == "imm":
            pipe.send(end.expect(EventKind.IMM, *arguments).imm)
        elif name == "sums":
            addresses, sizes = arguments
            pipe.send(_native.checksum(end.tensor.data_ptr() + addresses, sizes, "cuda"))
        elif name == "close_peer":
            began = time.monotonic()
            end.engine.close_peer(end.endpoint.peer)
            closed = time.monotonic()
            end.tensor.zero_()
            torch.cuda.synchronize()
            pipe.send(closed - began)
        elif name == "deregister":
            end.memory.close()
            pipe.send(None)
        elif name == "lost":
            pipe.send(end.expect(EventKind.PEER_LOST).reason)
        elif name == "nonzero":
            pipe.send(int(torch.count_nonzero(end.tensor)))


class Remote:
    """The other end, in a process of its own, doing what it is asked."""

    def __init__(self, nbytes: int, options: dict[str, Any], device: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(far, nbytes, options, device), daemon=True
        )
        self.process.start()
        self.path = ""

    def meet(self, end: End) -> None:
        """Connect both."""
        offer = self.receive()
        self.pipe.send(end.offer())
        end.connect(offer)
        self.path = self.receive()

    def ask(self, *order: Any) -> Any:
        """Have an order carried out; its result."""
        self.pipe.send(order)
        return self.receive()

    def receive(self) -> Any:
        """What the process says next."""
        if not self.pipe.poll(PATIENCE_S):
            raise TimeoutError("the other process says nothing")
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
