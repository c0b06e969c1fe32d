// SPDX-License-Identifier: Apache-2.0
/// GPU memory as a dma-buf, by which the kernel lets another device read and write it.
#pragma once

#include <cstdint>
#include <string>

#include "core/regions.h"
#include "core/unique_fd.h"
#include "cuda/device.h"

namespace rkv::cuda {

struct DmaBuf {
  UniqueFd fd;
  std::uint64_t offset = 0;  ///< Bytes from its start to that of the range.
};

/// Why this GPU exports no dma-buf; empty if it does.
[[nodiscard]] std::string find_dmabuf_fault(const Gpu& gpu);

/// Exports `range`. Whoever imports it holds the memory by itself, so the descriptor may be closed
/// then. @throw std::runtime_error with call, result and remedy.
[[nodiscard]] DmaBuf export_dmabuf(const Gpu& gpu, const MemoryRange& range);

/// The pages that `range` touches: exports are of whole pages of the host.
[[nodiscard]] MemoryRange pages_around(const MemoryRange& range, std::uint64_t page_bytes);

}  // namespace rkv::cuda
