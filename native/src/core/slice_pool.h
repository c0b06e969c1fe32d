// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "core/types.h"

namespace rkv {

/// The slices of one transfer; back in their pool when the last owner lets go.
using Slices = std::shared_ptr<std::vector<WriteSlice>>;

/// Keeps the memory of finished transfers for new ones. The slices of 65,536 rows are 2.6 MB,
/// and mapping these anew for each transfer took 100 to 200 ns a row, against 20 for filling them.
class SlicePool : public std::enable_shared_from_this<SlicePool> {
 public:
  /// Empty, with the room of an earlier transfer. Thread-safe, as is letting go.
  [[nodiscard]] Slices take() {
    std::unique_ptr<std::vector<WriteSlice>> slices;
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        slices = std::move(idle_.back());
        idle_.pop_back();
      }
    }
    if (!slices) slices = std::make_unique<std::vector<WriteSlice>>();
    return {slices.release(), [pool = shared_from_this()](std::vector<WriteSlice>* used) {
              pool->put_back(std::unique_ptr<std::vector<WriteSlice>>(used));
            }};
  }

 private:
  static constexpr std::size_t kMaxIdle = 16;  ///< Transfers prepared at one time, usually.

  void put_back(std::unique_ptr<std::vector<WriteSlice>> slices) {
    slices->clear();
    const std::lock_guard lock(mutex_);
    if (idle_.size() < kMaxIdle) idle_.push_back(std::move(slices));
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<std::vector<WriteSlice>>> idle_;
};

}  // namespace rkv
