# SPDX-License-Identifier: Apache-2.0
"""Writes that never pause, until something happens to the peer, and the account of them."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.engine.node import Node

if TYPE_CHECKING:
    from rdma_kv_cache._native import Event
    from tests.engine.node import Invitation

PAGE_BYTES = 8192
SLOTS = 8  # writes outstanding
TURN_S = 0.2


class Report(NamedTuple):
    """What became of a TrafficNode's writes."""

    reason: str  # of PEER_LOST
    written: int
    failed: int
    wrong: list[str]  # what must not be: writes not ended exactly once, signals out of order


class TrafficNode(Node):
    """Writes out of the lower half of its buffer into the upper half of its peer's.

    Has a second peer, the bystander, that nothing must happen to.
    """

    def __init__(self, incarnation: int, nbytes: int, **config: Any) -> None:
        super().__init__(incarnation, nbytes, **config)
        self._half = nbytes // 2
        self._bystander = self.engine.create_endpoint("bystander")
        self._bystander_base = 0
        self._restart()

    def _restart(self) -> None:
        self._slot_of: dict[int, int] = {}
        self._ended: Counter[int] = Counter()
        self._failed = 0
        self._next_imm = 0
        self._round = 0
        self._reason = ""
        self._wrong: list[str] = []
        self._closed = False
        self._fenced: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._thread: threading.Thread | None = None

    def renew(self) -> None:
        """Makes a new endpoint in place of the peer's that was lost, or should have been."""
        self.close_peer()
        self._closed = True
        if self._thread is not None:
            self._thread.join()
        self.endpoint = self.engine.create_endpoint("victim")
        self._restart()

    def invite_bystander(self) -> Invitation:
        """As invite(), for the bystander."""
        return self.invite()._replace(endpoint=self._bystander.descriptor)

    def connect_bystander(self, other: Invitation) -> None:
        """As connect(), for the bystander, which connects at its own time."""
        self._bystander_base = other.base
        self.engine.connect(self._bystander.peer, other.endpoint, other.memory)

    def greet_bystander(self, imm: int) -> None:
        """Writes to the bystander, with a signal."""
        source, target = np.array([self.base]), np.array([self._bystander_base])
        self.engine.write(self._bystander.peer, source, target, np.array([PAGE_BYTES]), imm=imm)

    def begin(self, writes: bool = True) -> None:
        """Starts to write, or just to watch."""
        self._thread = threading.Thread(target=self._exchange, args=(writes,), daemon=True)
        self._thread.start()

    def progress(self) -> tuple[int, int]:
        """Writes done, and signals received."""
        return self._ended.total(), self._next_imm

    def report(self, timeout_s: float) -> Report | None:
        """Once the peer is lost or closed and everything written has ended; None if it is not."""
        assert self._thread is not None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return None
        wrong = [f"write {i} ended {n} times" for i, n in self._ended.items() if n != 1]
        wrong += [f"write {i} never ended" for i in self._slot_of if i not in self._ended]
        return Report(self._reason, self._ended.total(), self._failed, self._wrong + wrong)

    def fence(self) -> None:
        """Closes the peer while it writes."""
        self.close_peer()
        self._snapshot()
        self._closed = True

    def fence_memory(self) -> None:
        """Closes the buffer while the peer writes."""
        self.close_memory()
        self._snapshot()

    def _snapshot(self) -> None:
        if self._fenced is None:
            self._fenced = self.buffer[self._half :].copy()

    def landed_after_fence(self) -> int:
        """Bytes that have changed since the peer was lost or fenced."""
        assert self._fenced is not None
        return int((self.buffer[self._half :] != self._fenced).sum())

    def late_events(self) -> list[str]:
        """Events that arrived although everything had ended."""
        return [event.kind.name for event in self.engine.poll() if self._is_of_peer(event)]

    def _is_of_peer(self, event: Event) -> bool:
        return event.peer == self.endpoint.peer

    def _exchange(self, writes: bool) -> None:
        while not self._reason and not self._closed:
            if writes:
                writes = self._top_up()
            self._take_events()
        while len(self._ended) < len(self._slot_of) and self.engine.wait(TURN_S):
            self._take_events()

    def _top_up(self) -> bool:
        """Keeps every slot busy. False once the peer takes no more."""
        busy = {slot for i, slot in self._slot_of.items() if i not in self._ended}
        for slot in set(range(SLOTS)) - busy:
            try:
                self._slot_of[self._write_slot(slot)] = slot
            except (RuntimeError, ValueError):  # lost, or closed
                return False
        return True

    def _write_slot(self, slot: int) -> int:
        nbytes = self._half // SLOTS
        first = slot * nbytes
        self._round += 1
        self.buffer[first : first + nbytes] = self._round % 251
        rows = list(range(first, first + nbytes, PAGE_BYTES))
        random.shuffle(rows)
        source = self.base + np.array(rows)
        target = self.remote_base + self._half + np.array(rows)
        return self.engine.write(
            self.endpoint.peer, source, target, np.full(len(rows), PAGE_BYTES), imm=self._round - 1
        )

    def _take_events(self) -> None:
        self.engine.wait(TURN_S)
        for event in self.engine.poll():
            if self._is_of_peer(event):
                self._take(event)
            elif event.peer == self._bystander.peer and event.kind.name != "TRANSFER_DONE":
                self._wrong.append(f"the bystander: {event.kind.name} {event.reason}")

    def _take(self, event: Event) -> None:
        match event.kind.name:
            case "TRANSFER_DONE":
                self._ended[event.id] += 1
            case "TRANSFER_FAILED":
                self._ended[event.id] += 1
                self._failed += 1
            case "IMM":
                if event.imm != self._next_imm:
                    self._wrong.append(f"signal {event.imm} in place of {self._next_imm}")
                self._next_imm = event.imm + 1
            case "PEER_LOST":
                self._snapshot()
                self._reason = event.reason
