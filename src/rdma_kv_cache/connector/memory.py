# SPDX-License-Identifier: Apache-2.0
"""What differs between KV memory of the host and of a GPU; torch is imported only for a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from rdma_kv_cache import _native

if TYPE_CHECKING:
    import torch


class Page(Protocol):
    """A few bytes of the same kind of memory, for the probe of a path."""

    @property
    def address(self) -> int:
        """Its first byte."""

    def fill(self, data: bytes) -> None:
        """Write `data` to its beginning; it is there when this returns."""


class KVMemory(Protocol):
    """The memory that one worker's KV cache is in."""

    @property
    def kind(self) -> str:
        """The native engine's word for it: 'host' or 'cuda'."""

    def near(self, address: int) -> str:
        """Where it is, for the choice of NICs; empty if that is not known."""

    def stream(self) -> int | None:
        """The CUDA stream that the calling thread's kernels go to; None if there is none."""

    def page(self, nbytes: int) -> Page:
        """Allocate `nbytes` bytes of zeros."""


class HostMemory:
    """KV memory of the CPU build. What a layer hook announces is in memory already."""

    kind = "host"

    def near(self, address: int) -> str:
        """See KVMemory."""
        node = _native.numa_node(address)
        return f"numa:{node}" if node >= 0 else ""

    def stream(self) -> int | None:
        """See KVMemory."""
        return None

    def page(self, nbytes: int) -> Page:
        """See KVMemory."""
        return _HostPage(nbytes)


class CudaMemory:
    """KV memory of a GPU. A layer hook comes when its kernels are launched, not when they ran."""

    kind = "cuda"

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._current_stream = torch.cuda.current_stream
        # For pages. Not the default one, which has the model's kernels ahead of us, and one for
        # all: torch gives each stream memory of its own, 2 MiB at a time.
        self._page_stream = torch.cuda.Stream(device)

    def near(self, address: int) -> str:
        """See KVMemory."""
        import torch

        gpu = torch.cuda.get_device_properties(self._device)
        try:
            return f"pci:{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
        except AttributeError:  # torch < 2.8
            return ""

    def stream(self) -> int | None:
        """See KVMemory."""
        return int(self._current_stream(self._device).cuda_stream)

    def page(self, nbytes: int) -> Page:
        """See KVMemory."""
        return _CudaPage(self._page_stream, nbytes)


class _HostPage:
    def __init__(self, nbytes: int) -> None:
        self._bytes = np.zeros(nbytes, dtype=np.uint8)
        self.address = self._bytes.ctypes.data

    def fill(self, data: bytes) -> None:
        self._bytes[: len(data)] = np.frombuffer(data, dtype=np.uint8)


class _CudaPage:
    def __init__(self, stream: torch.cuda.Stream, nbytes: int) -> None:
        import torch

        self._stream = stream
        with torch.cuda.stream(stream):
            self._bytes = torch.zeros(nbytes, dtype=torch.uint8, device=stream.device)
        stream.synchronize()
        self.address = self._bytes.data_ptr()

    def fill(self, data: bytes) -> None:
        import torch

        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with torch.cuda.stream(self._stream):
            self._bytes[: len(data)].copy_(source)
        self._stream.synchronize()
