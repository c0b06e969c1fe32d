// SPDX-License-Identifier: Apache-2.0
/// GPUs in this process, behind the table of CUDA driver functions: their memory is host memory,
/// and their dma-bufs can be registered with the fake fabric (fake_rdma.h). For one thread.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/regions.h"
#include "cuda/driver.h"
#include "verbs/ibverbs.h"

namespace rkv::cuda {

/// One at a time; the table's functions act on the one that exists.
class FakeCuda {
 public:
  FakeCuda();
  FakeCuda(const FakeCuda&) = delete;
  FakeCuda& operator=(const FakeCuda&) = delete;
  ~FakeCuda();

  [[nodiscard]] static const Cuda& table();
  /// The fake fabric's functions, ibv_reg_dmabuf_mr() included, with the rules of its man page.
  [[nodiscard]] static const verbs::Ibverbs& verbs_table();

  /// Page-aligned memory of a GPU; freed with this.
  std::uint64_t allocate(std::size_t nbytes, int gpu = 0);
  /// Dma-bufs whose descriptor is open.
  [[nodiscard]] std::size_t open_dmabufs() const;

  // What the GPUs can do: attributes by number, the same for all.
  std::map<int, int> attributes;
  Result export_result = kSuccess;
  Result flush_result = kSuccess;
  /// Allocations that cuMemGetAddressRange() would name in pieces refuse SYNC_MEMOPS as well.
  Result set_attribute_result = kSuccess;
  int dmabuf_mr_error = 0;  ///< errno of ibv_reg_dmabuf_mr().

  // What was asked of them.
  std::vector<MemoryRange> exports;
  std::vector<std::uint64_t> export_flags;
  std::vector<int> flushed;  ///< GPUs, in order.
  std::vector<std::uint64_t> synchronous;
  std::size_t dmabuf_mrs = 0;
  int retained_contexts = 0;

  struct Block {
    std::uint64_t address;
    std::size_t nbytes;
    int gpu;
  };
  std::vector<Block> blocks;
  std::map<int, MemoryRange> dmabufs;  ///< By descriptor.
};

}  // namespace rkv::cuda
