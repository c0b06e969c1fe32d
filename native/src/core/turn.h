// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <mutex>

namespace rkv {

/// Whose turn it is to run the engine. Callers only try, and the progress thread goes first: it
/// answers heartbeats, however busily an application polls.
class Turn {
 public:
  /// The progress thread's.
  void lock() {
    wanted_.store(true, std::memory_order_relaxed);
    mutex_.lock();
    wanted_.store(false, std::memory_order_relaxed);
  }
  void unlock() { mutex_.unlock(); }
  [[nodiscard]] bool try_lock() {
    return !wanted_.load(std::memory_order_relaxed) && mutex_.try_lock();
  }

 private:
  std::mutex mutex_;
  std::atomic<bool> wanted_ = false;
};

}  // namespace rkv
