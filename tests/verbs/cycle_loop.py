# SPDX-License-Identifier: Apache-2.0
"""Connects, transfers and closes again and again; prints what is in use as JSON lines."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from rdma_kv_cache._native import Engine
from tests.engine.node import PATIENCE_S, make_config

BUFFER_BYTES = 256 << 10
OBJECTS = ("qp", "cq", "pd", "mr", "srq")


def wait_for(engine: Engine, peer: int, kind: str) -> None:
    """Returns when this event has come. Those of earlier cycles' peers do not matter."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        if not engine.wait(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"no {kind} within {PATIENCE_S} s")
        for event in engine.poll(1):
            if event.peer != peer:
                continue
            if event.kind.name in ("PEER_LOST", "TRANSFER_FAILED"):
                raise RuntimeError(f"{event.kind.name}: {event.reason}")
            if event.kind.name == kind:
                return


def cycle(engines: list[Engine], buffers: list[np.ndarray], imm: int) -> None:
    """Two endpoints and two registrations come and go, one transfer between them."""
    memory = [
        e.register_memory(b.ctypes.data, b.nbytes) for e, b in zip(engines, buffers, strict=True)
    ]
    ends = [engine.create_endpoint(f"cycle-{imm}") for engine in engines]
    for i, engine in enumerate(engines):
        engine.connect(ends[i].peer, ends[1 - i].descriptor, [memory[1 - i].descriptor])
    for engine, end in zip(engines, ends, strict=True):
        wait_for(engine, end.peer, "CONNECTED")
    buffers[0][:] = imm % 251
    pages = np.arange(0, BUFFER_BYTES, 8192)[::-1]
    source, target = (b.ctypes.data + pages for b in buffers)
    engines[0].write(ends[0].peer, source, target, np.full(len(pages), 8192), imm=imm)
    wait_for(engines[0], ends[0].peer, "TRANSFER_DONE")
    wait_for(engines[1], ends[1].peer, "IMM")
    assert (buffers[1] == imm % 251).all()
    for engine, end, region in zip(engines, ends, memory, strict=True):
        engine.close_peer(end.peer)
        region.close()


def usage(engines: list[Engine]) -> dict[str, int]:
    """What this process and the device hold."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    objects = subprocess.run(
        ["rdma", "resource", "show"], capture_output=True, text=True, check=True
    ).stdout
    stats = [engine.stats() for engine in engines]
    return {
        "rss_bytes": pages * resource.getpagesize(),
        "fds": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "pinned_bytes": sum(int(s["pinned_bytes"]) for s in stats),
        "verbs_qps": sum(int(s["verbs_qps"]) for s in stats),
        **{f"rdma_{kind}": count_objects(objects, kind) for kind in OBJECTS},
    }


def count_objects(text: str, kind: str) -> int:
    """Of all devices, in the output of `rdma resource show`."""
    return sum(map(int, re.findall(rf"\b{kind} (\d+)", text)))


def main() -> None:
    """Runs argv[1] cycles and prints argv[2] samples on the way."""
    cycles, samples = map(int, sys.argv[1:])
    engines = [Engine(make_config(), i + 1) for i in range(2)]
    buffers = [np.zeros(BUFFER_BYTES, np.uint8) for _ in engines]
    for i in range(1, cycles + 1):
        cycle(engines, buffers, i)
        if i % (cycles // samples) == 0:
            print(json.dumps({"cycle": i, **usage(engines)}), flush=True)
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    main()
