# SPDX-License-Identifier: Apache-2.0
"""The cuda_ipc backend between two processes on a real GPU."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing")

from rdma_kv_cache import _native
from rdma_kv_cache._native import EventKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.gpu.ends import End, Remote

pytestmark = pytest.mark.gpu

NBYTES = 256 << 20
OPTIONS: dict[str, Any] = {"backend": "cuda_ipc", "peer_timeout_s": 5.0}


@pytest.fixture(params=[0, 1], ids=["same_gpu", "two_gpus"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[End, Remote]]:
    from tests.gpu.ends import End, Remote

    device = request.param
    if device >= torch.cuda.device_count():
        pytest.skip("needs a second GPU")
    remote = Remote(NBYTES, OPTIONS, device)
    end = End(NBYTES, _native.EngineConfig(**OPTIONS))
    remote.meet(end)
    way = "GPU 1 to GPU 0, peer to peer" if device else "same GPU"
    assert remote.path == f"cuda_ipc: {way}"
    yield end, remote
    remote.close()
    end.engine.close()


def pages(page: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of `count` random pages on both sides, none twice."""
    random = np.random.default_rng(seed)
    total = NBYTES // page
    return random.permutation(total)[:count] * page, random.permutation(total)[:count] * page


def fill_random(end: End) -> None:
    end.tensor.random_(0, 256)
    torch.cuda.synchronize()


def sums(end: End, offsets: np.ndarray, page: int) -> np.ndarray:
    sizes = np.full(len(offsets), page, dtype=np.int64)
    return _native.checksum(end.tensor.data_ptr() + offsets, sizes, "cuda")


@pytest.mark.parametrize(
    ("page", "count"), [(1, 1), (17, 300), (4096, 9000), (65536, 2048), (3 << 20, 40)]
)
def test_scattered_pages_arrive(pair: tuple[End, Remote], page: int, count: int) -> None:
    end, remote = pair
    fill_random(end)
    here, there = pages(page, count)
    transfer = end.write(here, there, page, imm=41)
    assert end.expect(EventKind.TRANSFER_DONE).id == transfer
    assert remote.ask("imm") == 41
    found = remote.ask("sums", there, np.full(count, page, dtype=np.int64))
    np.testing.assert_array_equal(found, sums(end, here, page))


def test_checksum_agrees_with_the_host(pair: tuple[End, Remote]) -> None:
    end, _ = pair
    fill_random(end)
    copy = end.tensor[:100_000].cpu().numpy()
    sizes = np.array([100_000], dtype=np.int64)
    on_host = _native.checksum(np.array([copy.ctypes.data]), sizes)
    assert _native.checksum(np.array([end.tensor.data_ptr()]), sizes, "cuda") == on_host


def test_a_write_waits_for_its_mark(pair: tuple[End, Remote]) -> None:
    """The write is queued while the stream still computes what it is to send."""
    end, remote = pair
    page, count = 65536, 512
    here, there = pages(page, count)
    stream = torch.cuda.Stream()
    for round_ in range(1, 6):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            end.tensor.fill_(round_)
            mark = end.engine.mark(stream.cuda_stream)
        assert not end.engine.reached(mark)
        end.write(here, there, page, imm=round_, after=mark)
        assert not end.engine.reached(mark)
        assert remote.ask("imm") == round_
        assert end.engine.reached(mark)
        found = remote.ask("sums", there, np.full(count, page, dtype=np.int64))
        np.testing.assert_array_equal(found, sums(end, here, page))


def test_close_peer_shuts_the_writer_out(pair: tuple[End, Remote]) -> None:
    """Writes are under way when the target closes; from then on its memory stays as it is."""
    end, remote = pair
    fill_random(end)
    here, there = pages(65536, 4000)
    for _ in range(50):
        end.write(here, there, 65536)
    took_s = remote.ask("close_peer")
    print(f"close_peer under writes took {took_s * 1e3:.1f} ms")
    assert took_s < 3
    end.expect(EventKind.PEER_LOST)
    time.sleep(0.5)
    assert remote.ask("nonzero") == 0


def test_a_stopped_writer_cannot_write_after_the_fence(pair: tuple[End, Remote]) -> None:
    """The target fences a frozen process, which is thawed only then."""
    end, remote = pair
    far = remote
    # The remote end is frozen as the target's view of a dead writer: here it is the writer's turn.
    fill_random(end)
    os.kill(far.process.pid or 0, signal.SIGSTOP)
    began = time.monotonic()
    reason = end.expect(EventKind.PEER_LOST, 30).reason
    print(f"frozen peer seen after {time.monotonic() - began:.1f} s: {reason}")
    os.kill(far.process.pid or 0, signal.SIGCONT)
    end.engine.close_peer(end.endpoint.peer)
    assert far.ask("lost")


def test_a_killed_target_is_seen(pair: tuple[End, Remote]) -> None:
    end, remote = pair
    fill_random(end)
    here, there = pages(65536, 4000)
    for _ in range(20):
        end.write(here, there, 65536)
    remote.process.kill()
    began = time.monotonic()
    end.expect(EventKind.PEER_LOST, 30)
    print(f"killed target seen after {time.monotonic() - began:.2f} s")
    end.engine.close_peer(end.endpoint.peer)
    torch.cuda.synchronize()  # no sticky error is left


def test_deregistered_memory_is_closed(pair: tuple[End, Remote]) -> None:
    end, remote = pair
    fill_random(end)
    remote.ask("deregister")
    here, there = pages(65536, 100)
    end.write(here, there, 65536)
    assert "deregistered" in end.expect(EventKind.PEER_LOST).reason
    assert remote.ask("nonzero") == 0


def test_memory_of_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory made by the virtual memory functions is either mapped or refused with the remedy."""
    from tests.gpu.ends import End, Remote

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    remote = Remote(NBYTES, OPTIONS)
    monkeypatch.undo()
    end = End(NBYTES, _native.EngineConfig(**OPTIONS))
    try:
        remote.meet(end)
    except (EOFError, TimeoutError):
        pytest.fail("the other end could not register its memory; its text is above")
    fill_random(end)
    here, there = pages(65536, 2048)
    end.write(here, there, 65536, imm=3)
    assert remote.ask("imm") == 3
    found = remote.ask("sums", there, np.full(2048, 65536, dtype=np.int64))
    np.testing.assert_array_equal(found, sums(end, here, 65536))
    remote.close()
    end.engine.close()


def test_host_memory_is_refused() -> None:
    from tests.gpu.ends import End

    end = End(1 << 20, _native.EngineConfig(**OPTIONS))
    buffer = np.zeros(4096, dtype=np.uint8)
    with pytest.raises(ValueError, match="GPU memory only"):
        end.engine.register_memory(buffer.ctypes.data, 4096)
    with pytest.raises(ValueError, match="not the address of GPU memory"):
        end.engine.register_memory(buffer.ctypes.data, 4096, "cuda")
    end.engine.close()


def test_auto_takes_the_gpu_path() -> None:
    from tests.gpu.ends import End, Remote

    options = OPTIONS | {"backend": "auto"}
    remote = Remote(1 << 20, options)
    end = End(1 << 20, _native.EngineConfig(**options))
    remote.meet(end)
    path = end.engine.peer_path(end.endpoint.peer)
    assert (path.backend, path.warning) == ("cuda_ipc", "")
    end.write(np.array([0]), np.array([0]), 4096, imm=1)
    assert remote.ask("imm") == 1
    remote.close()
    end.engine.close()
