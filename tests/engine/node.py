# SPDX-License-Identifier: Apache-2.0
"""One engine with one buffer and one endpoint, in this process (Node) or in another (RemoteNode)."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rdma_kv_cache._native import Engine, EngineConfig, checksum

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

#: The backend of every engine in these tests and its RDMA devices, and how many times slower than
#: a host this machine is: an emulated guest with Soft-RoCE sets all three.
BACKEND = os.environ.get("RKV_TEST_BACKEND", "tcp")
DEVICES = os.environ.get("RKV_TEST_DEVICES", "auto")
PATIENCE = float(os.environ.get("RKV_TEST_PATIENCE", "1"))
PATIENCE_S = 20.0 * PATIENCE
#: For a busy machine; what is not the subject of a test has a bound far beyond this.
SLACK_S = 4.0 * PATIENCE
#: Short, but long enough that no living peer is lost: with ACK timeouts below some 0.5 s an
#: emulated Soft-RoCE loses connections by itself.
PEER_TIMEOUT_S = 1.0 if BACKEND == "tcp" else 5.0
#: Of hypothesis.
EXAMPLES = max(5, int(60 / PATIENCE))

# Every new process is a fork of one that has all of this imported already.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def make_config(**fields: Any) -> EngineConfig:
    """A configuration of the backend that is tested."""
    return EngineConfig(**{"backend": BACKEND, "devices": DEVICES, **fields})


class Seen(NamedTuple):
    """An engine event that can be pickled."""

    kind: str
    id: int
    imm: int
    data: bytes
    reason: str


class Invitation(NamedTuple):
    """What the other side needs to connect."""

    endpoint: bytes
    memory: list[bytes]
    base: int


class Node:
    """An engine, its registered buffer and one endpoint."""

    def __init__(self, incarnation: int, nbytes: int, **config: Any) -> None:
        self.buffer = np.zeros(nbytes, np.uint8)
        self.engine = Engine(make_config(**config), incarnation)
        self.base = self.buffer.ctypes.data
        self.memory = self.engine.register_memory(self.base, nbytes)
        self.endpoint = self.engine.create_endpoint(f"peer-of-{incarnation}")
        self.remote_base = 0
        self.seen: list[Seen] = []
        self._unread: defaultdict[str, deque[Seen]] = defaultdict(deque)
        self._hammer: threading.Thread | None = None

    def invite(self) -> Invitation:
        """This side's part of the exchange."""
        return Invitation(self.endpoint.descriptor, [self.memory.descriptor], self.base)

    def connect(self, other: Invitation) -> None:
        """Connects to the other side; does not wait."""
        self.remote_base = other.base
        self.engine.connect(self.endpoint.peer, other.endpoint, other.memory)

    def write(self, src: list[int], dst: list[int], nbytes: list[int]) -> int:
        """Writes ranges given by offsets into the two buffers."""
        return self.engine.write(
            self.endpoint.peer,
            self.base + np.array(src, np.int64),
            self.remote_base + np.array(dst, np.int64),
            np.array(nbytes, np.int64),
        )

    def signal(self, imm: int) -> None:
        """Signals the other side."""
        self.engine.signal(self.endpoint.peer, imm)

    def send(self, data: bytes) -> None:
        """Sends a message to the other side."""
        self.engine.send(self.endpoint.peer, data)

    def next_event(self, kind: str, timeout_s: float = PATIENCE_S) -> Seen:
        """The oldest event of `kind` not yet returned. Raises TimeoutError listing the latest."""
        deadline = time.monotonic() + timeout_s
        while not self._unread[kind]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {kind} within {timeout_s} s; seen: {self.seen[-5:]}")
            self.engine.wait(left)
            for event in self.engine.poll():
                name = event.kind.name
                seen = Seen(name, event.id, event.imm, event.data, event.reason)
                self.seen.append(seen)
                self._unread[name].append(seen)
        return self._unread[kind].popleft()

    def kinds(self) -> list[str]:
        """Kinds of all events so far, in order."""
        return [event.kind for event in self.seen]

    def fill(self, value: int) -> None:
        """Sets every byte of the buffer."""
        self.buffer[:] = value

    def load(self, offset: int, data: bytes) -> None:
        """Copies bytes into the buffer."""
        self.buffer[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def dump(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the buffer."""
        return self.buffer[offset : offset + nbytes].tobytes()

    def digest(self, offset: int, nbytes: int) -> int:
        """Checksum of a piece of the buffer."""
        return int(checksum(np.array([self.base + offset]), np.array([nbytes]))[0])

    def peer_stats(self) -> dict[str, int | float]:
        """Counters of the peer."""
        return self.engine.peer_stats(self.endpoint.peer)

    def description(self) -> str:
        """What the engine uses and why."""
        return self.engine.description

    def stats(self) -> dict[str, int | float]:
        """Counters of the engine."""
        return self.engine.stats()

    def close_peer(self) -> None:
        """Fences the peer."""
        self.engine.close_peer(self.endpoint.peer)

    def close_memory(self) -> None:
        """Fences the buffer."""
        self.memory.close()

    def hammer(self) -> None:
        """From now on keeps overwriting the other buffer with changing bytes until it is lost."""
        self._hammer = threading.Thread(target=self._write_until_lost, daemon=True)
        self._hammer.start()

    def _write_until_lost(self) -> None:
        piece = self.buffer.nbytes // 16
        offsets = [i * piece for i in range(16)]
        value = 1
        while True:
            value = value % 250 + 1
            self.fill(value)
            try:
                self.write(offsets, offsets[::-1], [piece] * 16)
                self.next_event("TRANSFER_DONE")
            except (RuntimeError, TimeoutError):
                return

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()


def _serve(
    pipe: Connection, kind: type[Node], incarnation: int, nbytes: int, config: dict[str, Any]
) -> None:
    try:
        node = kind(incarnation, nbytes, **config)
    except Exception as error:  # noqa: BLE001 - handed to the caller in the other process
        pipe.send((False, error))
        return
    pipe.send((True, None))
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(node, method)(*args)))
        except Exception as error:  # noqa: BLE001 - handed to the caller in the other process
            pipe.send((False, error))


class RemoteNode:
    """A Node in a process of its own; `call` runs one of its methods there."""

    def __init__(
        self, incarnation: int, nbytes: int, *, kind: type[Node] = Node, **config: Any
    ) -> None:
        self._pipe, far = PROCESSES.Pipe()
        self.process = PROCESSES.Process(
            target=_serve, args=(far, kind, incarnation, nbytes, config), daemon=True
        )
        self.process.start()
        self._started = False
        far.close()

    def wait_until_started(self) -> None:
        """Raises what the Node's constructor raised."""
        if not self._started:
            self._answer("start")
            self._started = True

    def call(self, method: str, *args: Any) -> Any:
        """Runs Node.`method` there; raises what it raised."""
        self.wait_until_started()
        self._pipe.send((method, args))
        return self._answer(method)

    def _answer(self, method: str) -> Any:
        if not self._pipe.poll(PATIENCE_S + 5):
            raise TimeoutError(f"{method}: no answer from the other process")
        fine, result = self._pipe.recv()
        if not fine:
            raise result
        return result

    def kill(self) -> None:
        """SIGKILL; also ends a stopped process."""
        self.process.kill()
        self.process.join(10)
        self._pipe.close()


def connect(near: Node, far: RemoteNode) -> None:
    """Connects both and waits until both are usable."""
    near.connect(far.call("invite"))
    far.call("connect", near.invite())
    near.next_event("CONNECTED")
    far.call("next_event", "CONNECTED")
