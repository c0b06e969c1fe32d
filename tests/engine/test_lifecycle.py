# SPDX-License-Identifier: Apache-2.0
"""Engines end when told to, and never hold up the interpreter."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdma_kv_cache._native import Engine, checksum
from tests.engine.node import EXAMPLES, PATIENCE_S, Node, make_config

LEAKY_PROGRAM = """
import numpy as np
from rdma_kv_cache._native import Engine
from tests.engine.node import make_config
engines = [Engine(make_config(), i + 1) for i in range(2)]
buffers = [np.zeros(1 << 20, np.uint8) for _ in engines]
memory = [e.register_memory(b.ctypes.data, b.nbytes) for e, b in zip(engines, buffers)]
ends = [e.create_endpoint("x") for e in engines]
for i in range(2):
    engines[i].connect(ends[i].peer, ends[1 - i].descriptor, [memory[1 - i].descriptor])
engines[0].wait(5)
print("leaving", flush=True)
"""


def test_the_interpreter_exits_with_engines_running() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAKY_PROGRAM], capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"leaving", b"")


def test_close_is_final_and_may_be_repeated() -> None:
    node = Node(11, 4096)
    node.close()
    node.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        node.stats()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        node.engine.create_endpoint("x")
    assert node.engine.poll() == []
    node.close_memory()


def test_wait_and_close_release_the_gil() -> None:
    engine = Engine(make_config(), 1)
    turns = 0
    ended = threading.Event()

    def count() -> None:
        nonlocal turns
        while not ended.is_set():
            turns += 1
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    start = time.monotonic()
    assert not engine.wait(0.3)
    assert 0.25 < time.monotonic() - start < 2.0
    ended.set()
    counter.join()
    assert turns > 20
    engine.close()


MASK = 2**64 - 1
PRIMES = (
    0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5,
)  # fmt: skip


def rotl(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & MASK


def xxh64(data: bytes) -> int:
    """The XXH64 specification, written plainly."""
    p1, p2, p3, p4, p5 = PRIMES

    def turn(acc: int, lane: int) -> int:
        return rotl((acc + lane * p2) & MASK, 31) * p1 & MASK

    at, acc = 0, p5
    if len(data) >= 32:
        lanes = [(p1 + p2) & MASK, p2, 0, -p1 & MASK]
        while len(data) - at >= 32:
            for i in range(4):
                word = int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little")
                lanes[i] = turn(lanes[i], word)
            at += 32
        acc = sum(rotl(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for lane in lanes:
            acc = ((acc ^ turn(0, lane)) * p1 + p4) & MASK
    acc = (acc + len(data)) & MASK
    while len(data) - at >= 8:
        word = int.from_bytes(data[at : at + 8], "little")
        acc = (rotl(acc ^ turn(0, word), 27) * p1 + p4) & MASK
        at += 8
    if len(data) - at >= 4:
        word = int.from_bytes(data[at : at + 4], "little")
        acc = (rotl(acc ^ (word * p1 & MASK), 23) * p2 + p3) & MASK
        at += 4
    for byte in data[at:]:
        acc = rotl(acc ^ (byte * p5 & MASK), 11) * p1 & MASK
    acc = (acc ^ (acc >> 33)) * p2 & MASK
    acc = (acc ^ (acc >> 29)) * p3 & MASK
    return acc ^ (acc >> 32)


@settings(max_examples=EXAMPLES, deadline=None)
@given(pages=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_checksum_is_xxh64(pages: list[bytes]) -> None:
    whole = np.frombuffer(b"".join(pages) + b"\0", np.uint8)
    nbytes = np.array([len(page) for page in pages], np.int64)
    addresses = whole.ctypes.data + np.concatenate([[0], np.cumsum(nbytes)[:-1]])
    sums = checksum(addresses.astype(np.int64), nbytes)
    assert sums.dtype == np.uint64
    assert sums.tolist() == [xxh64(page) for page in pages]
