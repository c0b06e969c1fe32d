# SPDX-License-Identifier: Apache-2.0
"""Transfer engines over one RDMA device, used from Python, behind one small interface.

`write` covers what an application does per transfer; what it can prepare once is in `prepare`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TIMEOUT_S = 300.0
#: An emulated guest is 12 to 25 times as slow as its host, and so polling must last longer.
SPIN_US = 3000

Addresses = npt.NDArray[np.int64]
Region = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Device:
    """Where to connect: the port's RoCE GID and the address that belongs to it."""

    name: str
    gid_index: int
    address: str


@dataclass(frozen=True)
class Rows:
    """Blocks of one batch."""

    nbytes: int
    source: Addresses
    target: Addresses


class Peer(Protocol):
    """One end of a connection. `invite` and `connect` exchange whatever it needs."""

    def invite(self) -> Any: ...
    def connect(self, invitation: Any) -> None: ...
    def prepare(self, rows: Rows) -> None: ...
    def write(self) -> None: ...  # of what is prepared; returns when it is all in place
    def attend(self) -> None: ...
    def close(self) -> None: ...


class NixlPeer:
    """NIXL with UCX; descriptor lists are prepared, as vLLM's connector does."""

    DISTRIBUTION = "nixl-cu12"

    @staticmethod
    def environment(device: Device) -> dict[str, str]:
        """`rc_v` is RC for data and UD to set it up.

        NIXL's wheel brings its own libibverbs, which finds no providers on Debian and Ubuntu
        (https://github.com/ai-dynamo/nixl/pull/1929), so the system's must come before it.
        """
        return {
            "LD_PRELOAD": "libibverbs.so.1",
            "UCX_TLS": "rc_v",
            "UCX_NET_DEVICES": f"{device.name}:1",
            "UCX_IB_GID_INDEX": str(device.gid_index),
        }

    def __init__(self, region: Region, device: Device, name: str) -> None:
        api = import_module("nixl_cu12._api")  # nixl itself imports torch to ask for CUDA's version
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent = api.nixl_agent(name, config)
        area = [(region.ctypes.data, region.nbytes, 0, "")]
        self.registered = self.agent.register_memory(area, "DRAM")
        self.remote = ""
        self.lists: tuple[Any, ...] = ()

    def invite(self) -> bytes:
        return bytes(self.agent.get_agent_metadata())

    def connect(self, invitation: bytes) -> None:
        name = self.agent.add_remote_agent(invitation)
        self.remote = name.decode() if isinstance(name, bytes) else name

    def prepare(self, rows: Rows) -> None:
        def describe(owner: str, addresses: Addresses) -> Any:
            column = np.ones_like(addresses)
            table = np.stack([addresses, column * rows.nbytes, column * 0], axis=1)
            return self.agent.prep_xfer_dlist(owner, table, "DRAM")

        for handle in self.lists:
            self.agent.release_dlist_handle(handle)
        self.lists = describe("NIXL_INIT_AGENT", rows.source), describe(self.remote, rows.target)
        self.indices = np.arange(len(rows.source), dtype=np.int32)

    def write(self) -> None:
        local, remote = self.lists
        handle = self.agent.make_prepped_xfer("WRITE", local, self.indices, remote, self.indices)
        state = self.agent.transfer(handle)
        deadline = time.monotonic() + TIMEOUT_S
        while state != "DONE":
            state = self.agent.check_xfer_state(handle)
            if state == "ERR" or time.monotonic() > deadline:
                raise RuntimeError(f"NIXL transfer: {state}")
        self.agent.release_xfer_handle(handle)

    def attend(self) -> None:
        self.agent.get_new_notifs()

    def close(self) -> None:
        self.agent.deregister_memory(self.registered)


class MooncakePeer:
    """Mooncake's transfer engine."""

    DISTRIBUTION = "mooncake-transfer-engine-non-cuda"

    @staticmethod
    def environment(device: Device) -> dict[str, str]:
        """One worker thread: with the default of two it was slower on two CPUs."""
        return {
            "MC_GID_INDEX": str(device.gid_index),
            "MC_WORKERS_PER_CTX": "1",
            "MC_TRANSFER_TIMEOUT": str(int(TIMEOUT_S)),
            "MC_LOG_LEVEL": "WARNING",
        }

    def __init__(self, region: Region, device: Device, name: str) -> None:
        self.engine = import_module("mooncake.engine").TransferEngine()
        self.address = device.address
        status = self.engine.initialize(device.address, "P2PHANDSHAKE", "rdma", device.name)
        if status != 0:
            raise RuntimeError(f"Mooncake {name}: initialize: {status}")
        status = self.engine.register_memory(region.ctypes.data, region.nbytes)
        if status != 0:
            raise RuntimeError(f"Mooncake {name}: register_memory: {status}")

    def invite(self) -> str:
        return f"{self.address}:{self.engine.get_rpc_port()}"

    def connect(self, invitation: str) -> None:
        self.remote = invitation

    def prepare(self, rows: Rows) -> None:
        lengths = [rows.nbytes] * len(rows.source)
        self.columns = rows.source.tolist(), rows.target.tolist(), lengths

    def write(self) -> None:
        status = self.engine.batch_transfer_sync_write(self.remote, *self.columns)
        if status != 0:
            raise RuntimeError(f"Mooncake: batch_transfer_sync_write: {status}")

    def attend(self) -> None:
        pass

    def close(self) -> None:
        pass


class OurPeer:
    """The native engine through its Python binding."""

    DISTRIBUTION = "rdma-kv-cache"

    @staticmethod
    def environment(device: Device) -> dict[str, str]:
        return {}

    def __init__(self, region: Region, device: Device, name: str) -> None:
        self.native = import_module("rdma_kv_cache._native")
        config = self.native.EngineConfig(
            backend="verbs",
            devices=device.name,
            gid_index=device.gid_index,
            bind_host=device.address,
            spin_us=SPIN_US,
            peer_timeout_s=60.0,  # an emulated guest may stand still for seconds
        )
        self.engine = self.native.Engine(config, os.getpid())
        self.memory = self.engine.register_memory(region.ctypes.data, region.nbytes)
        self.endpoint = self.engine.create_endpoint(name)

    def invite(self) -> tuple[bytes, bytes]:
        return self.endpoint.descriptor, self.memory.descriptor

    def connect(self, invitation: tuple[bytes, bytes]) -> None:
        descriptor, memory = invitation
        self.engine.connect(self.endpoint.peer, descriptor, [memory])

    def prepare(self, rows: Rows) -> None:
        self.columns = rows.source, rows.target, np.full(len(rows.source), rows.nbytes, np.int64)

    def write(self) -> None:
        transfer = self.engine.write(self.endpoint.peer, *self.columns)
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            self.engine.wait(1.0)
            for event in self.engine.poll():
                if event.kind == self.native.EventKind.TRANSFER_DONE and event.id == transfer:
                    return
                if event.reason:
                    raise RuntimeError(event.reason)
        raise TimeoutError("no TRANSFER_DONE")

    def attend(self) -> None:
        self.engine.poll()

    def close(self) -> None:
        self.engine.close()


PEERS: dict[str, type[NixlPeer | MooncakePeer | OurPeer]] = {
    "nixl": NixlPeer,
    "mooncake": MooncakePeer,
    "ours": OurPeer,
}
