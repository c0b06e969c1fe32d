// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/backend.h"
#include "cuda/device.h"
#include "verbs/rail.h"
#include "verbs/region_keys.h"

namespace rkv::verbs {

/// Bytes of host memory that this process has pinned through one backend, on all rails.
using PinnedBytes = std::atomic<std::uint64_t>;

/// A region registered on every rail, in chunks that each device takes. Unpinned by the destructor.
class Registration final : public PinnedMemory {
 public:
  /// @throw std::runtime_error with call, errno and remedy; when the memlock limit is too small,
  /// before the kernel is asked. `gpu`: whose memory it is; null for host memory.
  Registration(const std::vector<std::shared_ptr<Rail>>& rails, const MemoryRange& range,
               const MemoryUse& use, std::uint64_t min_chunk_bytes, PinnedBytes& pinned,
               std::shared_ptr<const cuda::Gpu> gpu = nullptr);
  ~Registration() override;

  [[nodiscard]] std::size_t regions() const { return mrs_.size(); }
  [[nodiscard]] RegionKeys local_keys(std::size_t rail) const { return keys(rail, &ibv_mr::lkey); }
  [[nodiscard]] RegionKeys remote_keys(std::size_t rail) const { return keys(rail, &ibv_mr::rkey); }
  /// The GPU on which peers' writes must be flushed before they are reported; null: none.
  [[nodiscard]] std::shared_ptr<const cuda::Gpu> gpu_to_flush() const {
    return needs_flush_ ? gpu_ : nullptr;
  }

 private:
  [[nodiscard]] RegionKeys keys(std::size_t rail, std::uint32_t ibv_mr::* key) const;
  void prepare_gpu(const MemoryUse& use);
  [[nodiscard]] std::uint64_t pinned_bytes() const {
    return gpu_ == nullptr ? range_.nbytes * rails_ : 0;
  }

  const MemoryRange range_;
  const std::size_t rails_;
  PinnedBytes& pinned_;
  const std::shared_ptr<const cuda::Gpu> gpu_;
  std::uint64_t chunk_bytes_;
  bool needs_flush_ = false;
  std::vector<Handle<ibv_mr>> mrs_;  // all chunks of rail 0, then of rail 1, ...
};

/// Throws what ibv_reg_mr would fail with if `nbytes` more do not fit under the memlock limit.
/// @throw std::runtime_error with the lines for limits.conf and slurmd.
void check_memlock(std::uint64_t nbytes, std::uint64_t pinned, std::uint64_t limit);

}  // namespace rkv::verbs
