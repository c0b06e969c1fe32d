# SPDX-License-Identifier: Apache-2.0
"""Ways to move scattered blocks between two processes, behind one small interface.

Every transport has one instance in the sending and one in the receiving process. `send` covers
what an application does per transfer; what it can prepare once is in `prepare`.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rdma_kv_cache._native import Engine, EngineConfig, EventKind

Offsets = npt.NDArray[np.int64]
Region = npt.NDArray[np.uint8]

TIMEOUT_S = 30.0
SOCKET_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Case:
    """`count` blocks of `nbytes`: from `src` to `dst`, offsets into the two regions."""

    name: str
    count: int
    nbytes: int
    src: Offsets
    dst: Offsets

    @property
    def total(self) -> int:
        return self.count * self.nbytes


class Transport(Protocol):
    """One end. `invite` and `connect` exchange whatever the transport needs."""

    def invite(self) -> Any: ...
    def connect(self, invitation: Any) -> None: ...
    def prepare(self, case: Case) -> None: ...
    def send(self, case: Case) -> None: ...
    def receive(self, case: Case) -> None: ...
    def settle(self) -> None: ...
    def close(self) -> None: ...


class Ours:
    """The native engine."""

    def __init__(self, region: Region, incarnation: int) -> None:
        self.engine = Engine(EngineConfig(backend="tcp"), incarnation)
        self.base = region.ctypes.data
        self.memory = self.engine.register_memory(self.base, region.nbytes)
        self.endpoint = self.engine.create_endpoint("bench")
        self.remote_base = 0

    def invite(self) -> tuple[bytes, bytes, int]:
        return self.endpoint.descriptor, self.memory.descriptor, self.base

    def connect(self, invitation: tuple[bytes, bytes, int]) -> None:
        descriptor, memory, self.remote_base = invitation
        self.engine.connect(self.endpoint.peer, descriptor, [memory])

    def prepare(self, case: Case) -> None:
        self.nbytes = np.full(case.count, case.nbytes, np.int64)
        self.src, self.dst = self.base + case.src, self.remote_base + case.dst

    def send(self, case: Case) -> None:
        self.engine.write(self.endpoint.peer, self.src, self.dst, self.nbytes)
        self.engine.signal(self.endpoint.peer, 1)

    def receive(self, case: Case) -> None:
        self._wait_for(EventKind.IMM)

    def settle(self) -> None:
        self._wait_for(EventKind.TRANSFER_DONE)

    def _wait_for(self, kind: EventKind) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if self.engine.wait(1.0) and any(e.kind == kind for e in self.engine.poll()):
                return
        raise TimeoutError(f"no {kind}")

    def close(self) -> None:
        self.engine.close()


class RawTcp:
    """The same number of bytes as one contiguous stream: what loopback TCP can do."""

    def __init__(self, region: Region) -> None:
        self.view = region.data
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        self.connection: socket.socket | None = None

    def invite(self) -> tuple[str, int]:
        host, port = self.listener.getsockname()
        return host, port

    def connect(self, invitation: tuple[str, int]) -> None:
        self.connection = socket.socket()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.connect(invitation)

    def prepare(self, case: Case) -> None:
        pass

    def send(self, case: Case) -> None:
        assert self.connection is not None
        self.connection.sendall(self.view[: case.total])

    def receive(self, case: Case) -> None:
        assert self.connection is not None
        got = 0
        while got < case.total:
            got += self.connection.recv_into(self.view[got : case.total])

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self.listener.close()
        if self.connection is not None:
            self.connection.close()


class RawTcpReceiver(RawTcp):
    """The accepting end."""

    def connect(self, invitation: tuple[str, int]) -> None:
        self.listener.settimeout(TIMEOUT_S)
        self.connection, _ = self.listener.accept()


class Nixl:
    """NIXL with its UCX backend; descriptor lists are prepared once, as vLLM's connector does.

    `tls` is UCX_TLS: "tcp" for the network path, "" for whatever UCX finds best on one host.
    """

    def __init__(self, region: Region, name: str, tls: str) -> None:
        if tls:
            os.environ["UCX_TLS"] = tls
        else:
            os.environ.pop("UCX_TLS", None)
        api = import_module("nixl._api")
        # Without its progress thread NIXL is about twice as fast here.
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent = api.nixl_agent(name, config)
        self.base, self.nbytes = region.ctypes.data, region.nbytes
        self.registered = self.agent.register_memory([(self.base, self.nbytes, 0, "")], "DRAM")
        self.remote, self.remote_base = "", 0
        self.handle: Any = None

    def invite(self) -> tuple[bytes, int]:
        return self.agent.get_agent_metadata(), self.base

    def connect(self, invitation: tuple[bytes, int]) -> None:
        metadata, self.remote_base = invitation
        name = self.agent.add_remote_agent(metadata)
        self.remote = name.decode() if isinstance(name, bytes) else name

    def prepare(self, case: Case) -> None:
        def slots(base: int) -> list[tuple[int, int, int]]:
            return [(base + at, case.nbytes, 0) for at in range(0, self.nbytes, case.nbytes)]

        self.local_list = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", slots(self.base), "DRAM")
        self.remote_list = self.agent.prep_xfer_dlist(self.remote, slots(self.remote_base), "DRAM")
        self.src, self.dst = case.src // case.nbytes, case.dst // case.nbytes

    def send(self, case: Case) -> None:
        self.handle = self.agent.make_prepped_xfer(
            "WRITE", self.local_list, self.src, self.remote_list, self.dst, b"imm"
        )
        self.agent.transfer(self.handle)
        deadline = time.monotonic() + TIMEOUT_S
        while self.agent.check_xfer_state(self.handle) != "DONE":
            if time.monotonic() > deadline:
                raise TimeoutError("NIXL transfer")

    def receive(self, case: Case) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self.agent.get_new_notifs():
            if time.monotonic() > deadline:
                raise TimeoutError("NIXL notification")

    def settle(self) -> None:
        self.agent.release_xfer_handle(self.handle)

    def close(self) -> None:
        self.agent.deregister_memory(self.registered)


def nixl_version() -> str:
    """NIXL's version. Raises ImportError with what to install."""
    try:
        import_module("nixl._api")
    except ImportError as error:
        raise ImportError(f"{error}; pip install --no-deps nixl nixl-cu12") from error
    try:
        return version("nixl-cu12")
    except PackageNotFoundError:
        return version("nixl")
