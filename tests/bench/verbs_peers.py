# SPDX-License-Identifier: Apache-2.0
"""Transfer engines over one RDMA device, each a program of two processes that takes orders.

`python verbs_peers.py nixl DEVICE GID_INDEX ADDRESS` (or mooncake, or ours) reads lines such as
`write 4096 128` and answers with `{"seconds": 0.0071, "verified": true}`, as rkv_verbs_bench does.
The regions are shared memory, so the writing process sees for itself what landed; it compares
after the first batch of each shape. Only the call that a caller must make per transfer is timed.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

REGION_BYTES = 256 << 20
TIMEOUT_S = 300.0
#: How often the passive end looks after its connections: NIXL sets them up only from calls.
ATTENTION_S = 0.02

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
        api = import_module("nixl._api")
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent = api.nixl_agent(name, config)
        area = [(region.ctypes.data, region.nbytes, 0, "")]
        self.registered = self.agent.register_memory(area, "DRAM")
        self.remote = ""

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

        self.local_list = describe("NIXL_INIT_AGENT", rows.source)
        self.remote_list = describe(self.remote, rows.target)
        self.indices = np.arange(len(rows.source), dtype=np.int32)

    def write(self) -> None:
        lists = self.local_list, self.indices, self.remote_list, self.indices
        handle = self.agent.make_prepped_xfer("WRITE", *lists)
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


PEERS: Mapping[str, type[NixlPeer] | type[MooncakePeer] | type[OurPeer]] = {
    "nixl": NixlPeer,
    "mooncake": MooncakePeer,
    "ours": OurPeer,
}


def scatter(source: Region, target: Region, nbytes: int, count: int) -> Rows:
    """Rows no two neighbours of which are contiguous on both sides.

    More rows than the region has blocks: the same pairs again, so it does not matter who is last.
    """
    rng = np.random.default_rng(count)
    slots = REGION_BYTES // nbytes
    while True:
        pairs = rng.permutation(slots), rng.permutation(slots)
        src, dst = (np.resize(slot, count).astype(np.int64) for slot in pairs)
        if not np.any((np.diff(src) == 1) & (np.diff(dst) == 1)):
            break
    return Rows(nbytes, source.ctypes.data + src * nbytes, target.ctypes.data + dst * nbytes)


class Writer:
    """The process that takes orders."""

    def __init__(self, make: Callable[[Region, str], Peer]) -> None:
        self.source, self.target = (
            np.frombuffer(mmap.mmap(-1, REGION_BYTES), np.uint8) for _ in range(2)
        )
        self.target[:] = 255  # not zeros: every page must be there
        context = multiprocessing.get_context("fork")  # before the library starts threads
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, self.target, make), daemon=True)
        self.process.start()
        far.close()
        self.source[:] = np.random.default_rng(7).integers(0, 256, REGION_BYTES, np.uint8)
        self.peer = make(self.source, "writer")
        self.pipe.send(self.peer.invite())
        self.peer.connect(self.pipe.recv())
        self.rows: dict[tuple[int, int], Rows] = {}

    def write(self, nbytes: int, count: int) -> dict[str, float | bool]:
        """One batch."""
        verify = (nbytes, count) not in self.rows
        if verify:
            self.rows[nbytes, count] = scatter(self.source, self.target, nbytes, count)
        rows = self.rows[nbytes, count]
        self.peer.prepare(rows)
        if verify:
            self.blocks(self.target, rows.target, nbytes)[:] = 255
        start = time.monotonic()
        self.peer.write()
        took = time.monotonic() - start
        if verify:
            self.compare(rows)
        return {"seconds": took, "verified": verify}

    @staticmethod
    def blocks(region: Region, addresses: Addresses, nbytes: int) -> Any:
        return region.reshape(-1, nbytes)[(addresses - region.ctypes.data) // nbytes]

    def compare(self, rows: Rows) -> None:
        for source, target in zip(rows.source, rows.target, strict=True):
            at, to = source - self.source.ctypes.data, target - self.target.ctypes.data
            sent, got = self.source[at : at + rows.nbytes], self.target[to : to + rows.nbytes]
            if not np.array_equal(sent, got):
                raise RuntimeError(f"the block at {to} differs")

    def close(self) -> None:
        self.peer.close()
        self.process.kill()


def serve(pipe: Connection, region: Region, make: Callable[[Region, str], Peer]) -> None:
    """The passive process."""
    peer = make(region, "target")
    peer.connect(pipe.recv())
    pipe.send(peer.invite())
    while not pipe.poll(ATTENTION_S):
        peer.attend()


def main() -> None:
    """Reads orders to their end."""
    kind = PEERS[sys.argv[1]]
    device = Device(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    writer = Writer(lambda region, name: kind(region, device, name))
    print(json.dumps({"version": version(kind.DISTRIBUTION)}), flush=True)
    for line in sys.stdin:
        verb, nbytes, count = line.split()
        if verb != "write":
            raise ValueError(f"no order {verb!r}")
        print(json.dumps(writer.write(int(nbytes), int(count))), flush=True)
    writer.close()
    os._exit(0)  # libraries with threads of their own may hang or crash in their destructors


if __name__ == "__main__":
    main()
