// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "core/marks.h"
#include "cuda/device.h"

namespace rkv::cuda {

/// One counter a stream, in pinned host memory, which the GPU itself advances behind the work that
/// the stream was given (cuStreamWriteValue64, which orders that work's writes before its own).
///
/// Not CUDA events: cuEventQuery() takes a lock of the driver that kernel launches need as well.
class StreamMarks final : public Marks {
 public:
  /// Without `gpu`: on the one that is current where the first mark is made.
  explicit StreamMarks(std::shared_ptr<const Gpu> gpu = nullptr) : gpu_(std::move(gpu)) {}

  [[nodiscard]] Mark mark(std::uintptr_t stream) override;
  [[nodiscard]] bool reached(Mark mark) const override;

 private:
  void open();

  static constexpr std::size_t kStreams = 512;  ///< A word each; streams are few and long-lived.
  static constexpr int kCountBits = 52;         ///< Of a mark; above it the stream's number.

  std::shared_ptr<const Gpu> gpu_;
  /// Never freed: a stream that nobody waits for may still have a word to write.
  std::uint64_t* words_ = nullptr;
  DevicePtr device_words_ = 0;
  std::mutex mutex_;  // guards the two below; held while marking, so that counts keep their order
  std::unordered_map<std::uintptr_t, std::size_t> number_of_;
  std::array<std::uint64_t, kStreams> counts_{};
};

}  // namespace rkv::cuda
