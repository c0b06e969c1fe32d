// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "core/regions.h"
#include "cuda/device.h"

namespace rkv::cuda {

/// Words in this GPU's memory by which this engine shuts others' copy kernels out: see
/// copy_kernel.h. A writer maps a peer's memory once, so taking the mapping away needs its help;
/// a gate does not.
class Gates {
 public:
  using Slot = std::uint32_t;

  /// @throw std::runtime_error
  explicit Gates(std::shared_ptr<const Gpu> gpu);
  ~Gates();
  Gates(const Gates&) = delete;
  Gates& operator=(const Gates&) = delete;

  /// The memory that peers map, and where a slot is in it.
  [[nodiscard]] MemoryRange memory() const { return {base_, kBytes}; }
  [[nodiscard]] static std::uint64_t offset(Slot slot) { return std::uint64_t{slot} * kSlotBytes; }

  /// An open gate. None is used twice: a process that was stopped may come back to an old one.
  /// @throw std::runtime_error when all were used.
  [[nodiscard]] Slot open();
  /// No copy passes it from now on.
  void close(Slot slot);
  /// Waits until nobody is behind the gate. @return false if somebody still is after `timeout`: a
  /// process that was killed on its way; its copies ended with it.
  bool wait_until_idle(Slot slot, std::chrono::milliseconds timeout);

 private:
  static constexpr std::size_t kSlots = 65536;
  static constexpr std::size_t kSlotBytes = 16;
  static constexpr std::size_t kBytes = kSlots * kSlotBytes;

  const std::shared_ptr<const Gpu> gpu_;
  Stream stream_ = nullptr;
  DevicePtr base_ = 0;
  Slot next_ = 0;
};

}  // namespace rkv::cuda
