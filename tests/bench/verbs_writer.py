# SPDX-License-Identifier: Apache-2.0
"""A transfer engine of verbs_peers in two processes, driven by orders on stdin.

`python verbs_writer.py nixl DEVICE GID_INDEX ADDRESS` reads lines such as `write 4096 128 2`
(block, batch, repeats) and answers with `{"seconds": [0.0071, 0.0059], "verified": true}`, as
rkv_verbs_bench does. The regions are shared memory, so the writing process sees for itself what
landed; it compares after the first batch of each shape.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import select
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.verbs_peers import PEERS, Device, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from tests.bench.verbs_peers import Peer, Region

REGION_BYTES = 256 << 20
#: How often both ends look after their connections: NIXL sets up and keeps them only in calls.
ATTENTION_S = 0.05


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

    def write(self, nbytes: int, count: int, repeats: int) -> dict[str, list[float] | bool]:
        """Batches of one shape, one after the other."""
        verify = (nbytes, count) not in self.rows
        if verify:
            self.rows[nbytes, count] = scatter(self.source, self.target, nbytes, count)
        rows = self.rows[nbytes, count]
        self.peer.prepare(rows)
        if verify:
            slots = (rows.target - self.target.ctypes.data) // nbytes
            self.target.reshape(-1, nbytes)[slots] = 255
        seconds = [self.transfer()]
        if verify:
            self.compare(rows)
        seconds += [self.transfer() for _ in range(repeats - 1)]
        return {"seconds": seconds, "verified": verify}

    def transfer(self) -> float:
        """Seconds of one batch."""
        start = time.monotonic()
        self.peer.write()
        return time.monotonic() - start

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


def orders(attend: Callable[[], None]) -> Iterator[str]:
    """The lines of stdin."""
    with open(0, "rb", buffering=0) as file:  # unbuffered, so that select() sees every line
        while True:
            while not select.select([file], [], [], ATTENTION_S)[0]:
                attend()
            line = file.readline()
            if not line:
                return
            yield line.decode()


def main() -> None:
    """Reads orders to their end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries write there
    kind = PEERS[sys.argv[1]]
    device = Device(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    writer = Writer(lambda region, name: kind(region, device, name))
    answers.write(json.dumps({"version": version(kind.DISTRIBUTION)}) + "\n")
    for line in orders(writer.peer.attend):
        verb, *numbers = line.split()
        if verb != "write":
            raise ValueError(f"no order {verb!r}")
        answers.write(json.dumps(writer.write(*map(int, numbers))) + "\n")
    writer.close()
    os._exit(0)  # libraries with threads of their own may hang or crash in their destructors


if __name__ == "__main__":
    main()
