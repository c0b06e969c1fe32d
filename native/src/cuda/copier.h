// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>

#include "cuda/device.h"
#include "cuda/stream_marks.h"

namespace rkv::cuda {

/// The copy kernel, loaded into one GPU's context.
class CopyKernel {
 public:
  /// @throw std::runtime_error
  explicit CopyKernel(std::shared_ptr<const Gpu> gpu);
  ~CopyKernel();
  CopyKernel(const CopyKernel&) = delete;
  CopyKernel& operator=(const CopyKernel&) = delete;

  [[nodiscard]] const Gpu& gpu() const { return *gpu_; }
  [[nodiscard]] Function function() const { return function_; }

 private:
  const std::shared_ptr<const Gpu> gpu_;
  Module module_ = nullptr;
  Function function_ = nullptr;
};

/// What the kernel reads: one contiguous copy.
struct CopyRow {
  DevicePtr from;
  DevicePtr to;
  std::uint64_t nbytes;
  DevicePtr region_gate;
};
static_assert(sizeof(CopyRow) == 32);

/// Copies to one peer, in order, on a stream of their own that computing does not wait for.
class Copier {
 public:
  static constexpr std::size_t kMaxRows = 16384;  ///< Launched and not yet done.
  /// Several launches in flight keep the GPU busy while the first is accounted for; each costs the
  /// stream about 8 us between two kernels.
  static constexpr std::size_t kRowsPerLaunch = 4096;

  /// `peer_gate` is mapped here. @throw std::runtime_error
  Copier(std::shared_ptr<const CopyKernel> kernel, StreamMarks& marks, DevicePtr peer_gate);
  /// Waits for what was launched.
  ~Copier();
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  [[nodiscard]] std::size_t room() const { return kMaxRows - (end_ - begin_); }
  /// Launches a prefix of `rows`. @return its length and the mark behind it. @throw
  /// std::runtime_error
  struct Launched {
    std::size_t rows = 0;
    Mark mark = 0;
  };
  Launched launch(std::span<const CopyRow> rows);
  /// The oldest `rows` rows are done.
  void retire(std::size_t rows) { begin_ += rows; }

  /// Waits until nothing is under way.
  void drain() noexcept;
  /// Whether the peer had closed a gate when a copy came to it.
  [[nodiscard]] bool was_refused() const;
  /// Empty, or the error that the GPU reports.
  [[nodiscard]] std::string error() const;

 private:
  const std::shared_ptr<const CopyKernel> kernel_;
  StreamMarks& marks_;
  const DevicePtr peer_gate_;
  Stream stream_ = nullptr;
  CopyRow* rows_ = nullptr;  // a ring in pinned host memory; behind it the word `refused`
  DevicePtr device_rows_ = 0;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
};

/// A stream that neither waits for nor holds up the streams of the application, served first.
/// @throw std::runtime_error
[[nodiscard]] Stream create_stream(const Gpu& gpu);

}  // namespace rkv::cuda
