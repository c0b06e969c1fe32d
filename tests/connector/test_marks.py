# SPDX-License-Identifier: Apache-2.0
"""Which mark of the GPU's stream each write waits for, and when a prefill counts as computed.

The test plays the GPU: it says how far the stream is. What is written is only recorded here; that
a gated write reads nothing too early is tested with the native engine.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from rdma_kv_cache.connector.heads import Slice
from rdma_kv_cache.connector.layout import KVLayout, Layer
from rdma_kv_cache.connector.messages import Cancel, Register
from rdma_kv_cache.connector.metadata import StepMetadata
from rdma_kv_cache.connector.producer_worker import ProducerWorker
from rdma_kv_cache.connector.settings import Settings
from rdma_kv_cache.connector.stats import TransferStats
from rdma_kv_cache.protocol.bootstrap import WorkerId
from tests.connector.pair import BLOCK_TOKENS, LAYERS, NUM_BLOCKS, PAGE_BYTES, chunk, end

BASE, REMOTE_BASE = 1 << 20, 1 << 30
LAYER_BYTES = NUM_BLOCKS * PAGE_BYTES


class Stream:
    """One CUDA stream and the engine that it is known to: marks are 1, 2, … in order."""

    kind = "cuda"

    def __init__(self) -> None:
        self.marks = 0
        self.reached_upto = 0
        self.writes: list[tuple[list[int], int | None, int]] = []
        self.cancelled: list[int] = []

    def stream(self) -> int:
        return 7

    def mark(self, stream: int) -> int:
        assert stream == 7
        self.marks += 1
        return self.marks

    def reached(self, mark: int) -> bool:
        return mark <= self.reached_upto

    def write(self, peer: int, src: Any, dst: Any, nbytes: Any, imm: int | None, after: int) -> int:
        layers = sorted({(int(address) - BASE) // LAYER_BYTES for address in src})
        self.writes.append((layers, imm, after))
        return len(self.writes)

    def cancel(self, peer: int, ids: list[int]) -> None:
        self.cancelled += ids


class Rig:
    """A prefill worker's transfers above a played GPU."""

    def __init__(self, **settings: object) -> None:
        def layers(base: int) -> tuple[Layer, ...]:
            return tuple(
                Layer(f"l{i}", 0, base + i * LAYER_BYTES, PAGE_BYTES, PAGE_BYTES)
                for i in range(LAYERS)
            )

        layout = KVLayout(layers(BASE), (BLOCK_TOKENS,), NUM_BLOCKS, ((BASE, LAYER_BYTES),))
        remote = KVLayout(layers(REMOTE_BASE), (BLOCK_TOKENS,), NUM_BLOCKS, ())
        self.gpu = Stream()
        self.stats = TransferStats()
        self.sent: list[object] = []
        peers: Any = SimpleNamespace(send=lambda _peer, message: self.sent.append(message))
        engine: Any = self.gpu
        self.producer = ProducerWorker(
            engine,
            engine,
            peers,
            layout,
            Settings("p", 1, "x", **settings),
            self.stats,  # type: ignore[arg-type]
        )
        self.peer: Any = SimpleNamespace(
            native=1,
            worker=WorkerId("decode-0", 0, 2),
            fan_out=1,
            slices=[Slice(0, 0, PAGE_BYTES)] * LAYERS,
            remote=SimpleNamespace(layers=remote.describe()),
        )

    def register(self, pages: list[int], prompt: int, transfer: str = "t") -> None:
        self.producer.on_message(self.peer, Register(transfer, 1, prompt, [pages]))

    def launch(self, *names: str) -> None:
        for name in names:
            self.producer.layer_computed(name, self.producer.mark())

    def begin(self, **meta: object) -> None:
        self.producer.begin_step(StepMetadata(**meta))  # type: ignore[arg-type]


def test_each_layer_waits_for_its_own_mark() -> None:
    rig = Rig()
    rig.register([9], 4)
    rig.begin(chunks=[chunk([1], 4, 4)])
    rig.launch("l0", "l1", "l2")
    rig.producer.end_step()
    assert rig.gpu.writes == [([0], None, 1), ([1], None, 2), ([2], 1, 3)]
    assert rig.gpu.marks == LAYERS


def test_a_register_in_mid_step_waits_for_what_is_launched() -> None:
    rig = Rig()
    rig.begin(chunks=[chunk([1], 4, 4)])
    rig.launch("l0", "l1")
    rig.register([9], 4)
    assert rig.gpu.writes == [([0], None, 1), ([1], None, 2)]
    rig.launch("l2")
    assert rig.gpu.writes[2:] == [([2], 1, 3)]


def test_a_late_register_does_not_wait_for_a_later_request() -> None:
    rig = Rig()
    rig.begin(chunks=[chunk([1], 4, 4)])
    rig.launch("l0", "l1", "l2")
    rig.producer.end_step()
    rig.begin(chunks=[chunk([2], 4, 4, "other")], ends=[end()])
    rig.launch("l0", "l1")
    rig.gpu.reached_upto = 2
    rig.register([9], 4)
    assert rig.gpu.writes == [([0, 1], None, 0), ([2], 1, 3)]


def test_one_mark_for_all_layers_that_no_hook_announced() -> None:
    rig = Rig()
    for transfer in ("t", "u"):
        rig.register([9], 4, transfer)
    rig.begin(chunks=[chunk([1], 4, 4), chunk([2], 4, 4, "u")])
    rig.launch("l0")
    rig.producer.end_step()
    assert [after for _, _, after in rig.gpu.writes[2:]] == [2, 2, 2, 2]
    assert rig.gpu.marks == 2


def test_steps_without_chunks_take_no_mark() -> None:
    rig = Rig()
    rig.begin()
    assert not rig.producer.has_chunks


def test_a_write_that_waits_for_the_gpu_keeps_its_blocks() -> None:
    rig = Rig()
    rig.register([9, 8], 8)
    rig.begin(chunks=[chunk([1], 8, 4)])
    rig.launch("l0")
    assert rig.producer.in_flight(["p-t"])
    rig.producer.on_message(rig.peer, Cancel("t", 1))
    assert rig.gpu.cancelled == [1]  # which fails at once if nothing of it is posted
    rig.producer.end_step()
    rig.begin(ends=[end(complete=False)])
    assert rig.sent == []
    assert rig.producer.take_finished() == set()
    rig.producer.on_written(1, ok=True)
    assert len(rig.sent) == 1
    assert rig.producer.take_finished() == {"p-t"}


def test_exposed_time_begins_when_the_gpu_is_done() -> None:
    rig = Rig()
    rig.register([9], 4)
    rig.begin(chunks=[chunk([1], 4, 4)])
    rig.launch("l0", "l1", "l2")
    rig.producer.end_step()
    assert rig.producer.awaits_gpu
    time.sleep(0.05)  # launched long ago, and the GPU computes
    rig.producer.tick(time.monotonic())
    rig.gpu.reached_upto = 3
    rig.producer.tick(time.monotonic())
    assert not rig.producer.awaits_gpu
    time.sleep(0.02)
    for write_id in (1, 2, 3):
        rig.producer.on_written(write_id, ok=True)
    assert 0.02 <= rig.stats.data["exposed_seconds"] < 0.04
    assert 0.02 <= rig.stats.data["busy_seconds"] < 0.04


def test_checksums_name_a_gpu_that_does_not_come() -> None:
    rig = Rig(checksum=True, transfer_timeout_s=0.01)
    rig.register([9], 4)
    rig.begin(chunks=[chunk([1], 4, 4)])
    rig.launch("l0")
    assert rig.gpu.writes == []
    assert "the GPU did not end a layer within 0.01 s" in str(rig.sent)


@pytest.mark.gpu
def test_pages_of_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available: needs an NVIDIA GPU")
    from rdma_kv_cache import _native
    from rdma_kv_cache.connector.memory import CudaMemory

    memory = CudaMemory(torch.device("cuda", 0))
    page = memory.page(4096)
    page.fill(b"\x05" * 4096)
    host = torch.full((4096,), 5, dtype=torch.uint8)
    found = _native.checksum(*_one(page.address, 4096), "cuda")
    assert found == _native.checksum(*_one(host.data_ptr(), 4096), "host")
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert memory.stream() == torch.cuda.current_stream().cuda_stream
    assert memory.near(page.address).startswith("pci:0")


def _one(address: int, nbytes: int) -> tuple[Any, Any]:
    import numpy as np

    return np.array([address], dtype=np.int64), np.array([nbytes], dtype=np.int64)
