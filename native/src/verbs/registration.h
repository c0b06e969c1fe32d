// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/backend.h"
#include "verbs/rail.h"
#include "verbs/region_keys.h"

namespace rkv::verbs {

/// Bytes that this process has pinned through one backend, on all rails.
using PinnedBytes = std::atomic<std::uint64_t>;

/// A region registered on every rail, in chunks that each device takes. Unpinned by the destructor.
class Registration final : public PinnedMemory {
 public:
  /// @throw std::runtime_error with call, errno and remedy; when the memlock limit is too small,
  /// before the kernel is asked. std::invalid_argument for memory that verbs cannot reach.
  Registration(const std::vector<std::shared_ptr<Rail>>& rails, const MemoryRange& range,
               const MemoryUse& use, std::uint64_t min_chunk_bytes, PinnedBytes& pinned);
  ~Registration() override;

  [[nodiscard]] std::size_t regions() const { return mrs_.size(); }
  [[nodiscard]] RegionKeys local_keys(std::size_t rail) const { return keys(rail, &ibv_mr::lkey); }
  [[nodiscard]] RegionKeys remote_keys(std::size_t rail) const { return keys(rail, &ibv_mr::rkey); }

 private:
  [[nodiscard]] RegionKeys keys(std::size_t rail, std::uint32_t ibv_mr::* key) const;
  [[nodiscard]] std::uint64_t pinned_bytes() const { return range_.nbytes * rails_; }

  const MemoryRange range_;
  const std::size_t rails_;
  PinnedBytes& pinned_;
  std::uint64_t chunk_bytes_;
  std::vector<Handle<ibv_mr>> mrs_;  // all chunks of rail 0, then of rail 1, ...
};

/// Throws what ibv_reg_mr would fail with if `nbytes` more do not fit under the memlock limit.
/// @throw std::runtime_error with the lines for limits.conf and slurmd.
void check_memlock(std::uint64_t nbytes, std::uint64_t pinned, std::uint64_t limit);

}  // namespace rkv::verbs
