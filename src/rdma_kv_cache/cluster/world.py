# SPDX-License-Identifier: Apache-2.0
"""The MPI world of a job: who is which rank, the job's secret, and the first endpoint exchange.

MPI serves only until every engine is connected. Collectives are started non-blocking and tested
with sleeps in between: a blocking one spins on a core, which the starting engines need, and
cannot be given up when a rank fails (MPICH 5.0.2: Barrier with a dead rank hangs for good).
Buffers only, nothing is pickled.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rdma_kv_cache.cluster.roles import (
    ORCHESTRATOR,
    Place,
    RankRole,
    new_incarnation,
    place_of,
    tp_size_of,
)
from rdma_kv_cache.config import JobError, Problem
from rdma_kv_cache.protocol.bootstrap import EngineHello
from rdma_kv_cache.protocol.codec import MAX_FRAME_BYTES, ProtocolError, sign, verify

if TYPE_CHECKING:
    from rdma_kv_cache.config import JobConfig

SECRET_BYTES = 32
HELLO_SLOT_BYTES = 1024  # a host name has at most 64 bytes on Linux, the rest of a hello fewer
URL_SLOT_BYTES = 512
JOIN_TIMEOUT_S = 60.0
# An engine that does not start says so itself within its own limit: let it speak first.
START_MARGIN_S = 30.0
POLL_S = 0.02
LOOPBACK = "127.0.0.1"
ROLE_VARIABLE = "ROLE"
"""Set by the launcher in each component of a heterogeneous job: prefill or decode."""

_LENGTH = struct.Struct("<I")


class WorldError(RuntimeError):
    """An MPI collective did not come to its end in time, or was cancelled."""


@dataclass
class World:
    """This rank's view of the job. One thread at a time may call the collectives.

    `hellos` holds the hello of every rank, in rank order; `secret` signs all messages.
    """

    rank: int
    size: int
    role: RankRole
    engine: str
    secret: bytes
    hellos: list[EngineHello]
    timeout_s: float
    _comm: Any
    _mpi: Any
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def hello(self) -> EngineHello:
        """What this rank told the others."""
        return self.hellos[self.rank]

    def peers(self) -> list[EngineHello]:
        """Return the hellos of the engines of the other role; none for the orchestrator."""
        if self.role == ORCHESTRATOR:
            return []
        return [h for h in self.hellos if h.role not in (self.role, ORCHESTRATOR)]

    def bind_host(self) -> str:
        """Return the address that this rank's servers bind: loopback if all share one host.

        Raises WorldError if no address leads to the other hosts.
        """
        others = [h.host for h in self.hellos if h.host != self.hello.host]
        return address_towards(others[0]) if others else LOOPBACK

    def share_url(self, url: str = "", timeout_s: float = JOIN_TIMEOUT_S) -> str:
        """Return rank 0's `url` on every rank (what the others pass is ignored)."""
        slot = bytearray(_slot(url.encode(), URL_SLOT_BYTES))
        request = self._comm.Ibcast([slot, self._mpi.BYTE], root=0)
        self._complete(request, "broadcast of the orchestrator's URL", timeout_s)
        return _unslot(slot).decode()

    def exchange(self, outgoing: dict[str, bytes]) -> dict[str, bytes]:
        """Carry `outgoing[engine]` to each engine; return what each engine sent to this one.

        Every rank calls it once. Raises WorldError after `timeout_s` or `cancel`, and
        ProtocolError if a rank sends more than MAX_FRAME_BYTES.
        """
        parts = [outgoing.get(hello.engine, b"") for hello in self.hellos]
        sent = array("q", [len(part) for part in parts])
        received = array("q", bytes(8 * self.size))
        request = self._comm.Ialltoall([sent, self._mpi.INT64_T], [received, self._mpi.INT64_T])
        self._complete(request, "exchange of endpoint sizes", self.timeout_s)
        for hello, nbytes in zip(self.hellos, received, strict=True):
            if not 0 <= nbytes <= MAX_FRAME_BYTES:
                raise ProtocolError(f"{hello.engine} offers {nbytes} bytes of endpoints")
        outbox, inbox = b"".join(parts), bytearray(sum(received))
        request = self._comm.Ialltoallv(
            [outbox, sent.tolist(), _offsets(sent), self._mpi.BYTE],
            [inbox, received.tolist(), _offsets(received), self._mpi.BYTE],
        )
        self._complete(request, "exchange of endpoints", self.timeout_s)
        starts = _offsets(received)
        return {
            hello.engine: bytes(inbox[start : start + nbytes])
            for hello, start, nbytes in zip(self.hellos, starts, received, strict=True)
            if nbytes
        }

    def barrier(self) -> None:
        """Wait until every rank is here; no MPI call follows. Raises WorldError."""
        self._complete(self._comm.Ibarrier(), "barrier before READY", self.timeout_s)

    def cancel(self) -> None:
        """Make a collective that waits in another thread raise WorldError, and all later ones."""
        self._cancelled.set()

    def _complete(self, request: Any, what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not request.Test():
            if self._cancelled.wait(POLL_S):
                raise WorldError(f"MPI {what}: given up, this rank is stopping")
            if time.monotonic() > deadline:
                raise WorldError(
                    f"MPI {what}: not all {self.size} ranks came within {timeout_s:g} s; "
                    "one of them failed before it: see the logs of the run"
                )


def join(job: JobConfig) -> World:
    """Start MPI, check the world against the job file and meet all ranks.

    Raises JobError if the world has another size or other engines than `job`, WorldError if a
    rank does not come within JOIN_TIMEOUT_S.
    """
    mpi = _start_mpi()
    comm = mpi.COMM_WORLD
    _check_size(comm.size, job)
    place = place_of(comm.rank, job)
    _check_component(comm.rank, place, os.environ.get(ROLE_VARIABLE))
    world = World(
        rank=comm.rank,
        size=comm.size,
        role=place.role,
        engine=place.engine,
        secret=b"",
        hellos=[],
        timeout_s=job.orchestrator.engine_start_timeout_s + START_MARGIN_S,
        _comm=comm,
        _mpi=mpi,
    )
    secret = bytearray(secrets.token_bytes(SECRET_BYTES) if comm.rank == 0 else SECRET_BYTES)
    request = comm.Ibcast([secret, mpi.BYTE], root=0)
    world._complete(request, "broadcast of the job's secret", JOIN_TIMEOUT_S)
    world.secret = bytes(secret)
    hello = EngineHello(
        engine=place.engine,
        role=place.role,
        host=socket.gethostname(),
        incarnation=new_incarnation(),
        tp_size=tp_size_of(place, job),
    )
    slots = bytearray(HELLO_SLOT_BYTES * comm.size)
    mine = _slot(sign(hello, world.secret), HELLO_SLOT_BYTES)
    request = comm.Iallgather([mine, mpi.BYTE], [slots, HELLO_SLOT_BYTES, mpi.BYTE])
    world._complete(request, "exchange of hellos", JOIN_TIMEOUT_S)
    world.hellos = _read_hellos(slots, world, job)
    return world


def address_towards(host: str) -> str:
    """Return this machine's address on the way to `host`. Raises WorldError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, 9, socket.AF_INET, socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # UDP: chooses a route, sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise WorldError(
            f"no route to the rank on host {host!r}: {error}; "
            "every node must resolve the other nodes' host names"
        ) from error


def _start_mpi() -> Any:
    # rc must be set before the import of MPI. finalize=False: MPI_Finalize hangs when a rank
    # is dead, so ranks end by os._exit.
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    # Collectives run in an executor thread, one at a time.
    provided = MPI.Init_thread(MPI.THREAD_SERIALIZED)
    if provided < MPI.THREAD_SERIALIZED:
        raise WorldError(f"MPI_Init_thread gave level {provided}: no MPI calls from a thread")
    return MPI


def _check_size(size: int, job: JobConfig) -> None:
    if size == job.world_size:
        return
    expected = (
        f"{job.world_size} (1 orchestrator + {job.prefill.engines} prefill + "
        f"{job.decode.engines} decode)"
    )
    message = f"{size} rank(s), but the job file needs {expected}"
    remedy = f"Start exactly {job.world_size} ranks (mpiexec -n, srun -n)"
    if size == 1:
        message += "; each process is a world of its own"
        remedy = (
            "The launcher is not the one of this MPI library: use the mpiexec beside this python "
            f"with -n {job.world_size}; under Slurm set slurm.mpi to what this MPI speaks (pmi2 for "
            "MPICH, pmix for Open MPI; `srun --mpi=list` shows what there is), or slurm.launcher to "
            "mpiexec"
        )
    raise JobError([Problem("MPI world", "", message, remedy)])


def _check_component(rank: int, place: Place, component: str | None) -> None:
    """Raise JobError if a rank of one component of the job got the place of another."""
    role = "prefill" if place.role == ORCHESTRATOR else place.role
    if component is None or component == role:
        return
    message = f"rank {rank} is {place.engine}, but runs in the {component} component"
    remedy = (
        "The components must come in the order prefill, decode, with as many tasks as the job file "
        "has engines (and one for the orchestrator): use the script of `rdma-kv render`"
    )
    raise JobError([Problem("MPI world", "", message, remedy)])


def _read_hellos(slots: bytearray, world: World, job: JobConfig) -> list[EngineHello]:
    hellos: list[EngineHello] = []
    for rank in range(world.size):
        slot = slots[rank * HELLO_SLOT_BYTES : (rank + 1) * HELLO_SLOT_BYTES]
        try:
            hello: EngineHello = verify(_unslot(slot), world.secret, EngineHello)
        except ProtocolError as error:
            raise ProtocolError(f"hello of rank {rank}: {error}") from error
        _check_hello(rank, hello, job)
        hellos.append(hello)
    return hellos


def _check_hello(rank: int, hello: EngineHello, job: JobConfig) -> None:
    place = place_of(rank, job)
    expected = (place.engine, place.role, tp_size_of(place, job))
    found = (hello.engine, hello.role, hello.tp_size)
    if found != expected:
        message = (
            f"rank {rank} is (engine, role, TP size) {found}, expected {expected}: "
            "the ranks read different job files"
        )
        remedy = "Put the job file where every node sees the same one"
        raise JobError([Problem("MPI world", "", message, remedy)])


def _slot(data: bytes, nbytes: int) -> bytes:
    if _LENGTH.size + len(data) > nbytes:
        raise ProtocolError(f"{len(data)} bytes do not fit a slot of {nbytes}")
    return (_LENGTH.pack(len(data)) + data).ljust(nbytes, b"\0")


def _unslot(slot: bytes | bytearray) -> bytes:
    (length,) = _LENGTH.unpack_from(slot)
    if _LENGTH.size + length > len(slot):
        raise ProtocolError(f"slot of {len(slot)} bytes announces {length}")
    return bytes(slot[_LENGTH.size : _LENGTH.size + length])


def _offsets(counts: array[int]) -> list[int]:
    offsets, total = [], 0
    for count in counts:
        offsets.append(total)
        total += count
    return offsets
