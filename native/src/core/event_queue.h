// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <vector>

#include "core/types.h"

namespace rkv {

/// What the progress thread tells the application. Every method is thread-safe.
class EventQueue {
 public:
  void push(Event event);
  /// Up to `max_events` of the oldest events; never blocks.
  [[nodiscard]] std::vector<Event> poll(std::size_t max_events);
  [[nodiscard]] bool empty();
  /// True as soon as an event is queued, false after `timeout` without one.
  [[nodiscard]] bool wait(std::chrono::duration<double> timeout);

 private:
  std::mutex mutex_;
  std::condition_variable queued_;
  std::deque<Event> events_;
};

}  // namespace rkv
