// SPDX-License-Identifier: Apache-2.0
#include "core/event_queue.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "core/config.h"

namespace rkv {

void EventQueue::push(Event event) {
  event.time_ns = nanoseconds(Clock::now());
  {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
  }
  queued_.notify_all();
}

std::vector<Event> EventQueue::poll(std::size_t max_events) {
  const std::lock_guard lock(mutex_);
  const auto n = static_cast<std::ptrdiff_t>(std::min(max_events, events_.size()));
  std::vector<Event> batch(std::make_move_iterator(events_.begin()),
                           std::make_move_iterator(events_.begin() + n));
  events_.erase(events_.begin(), events_.begin() + n);
  return batch;
}

bool EventQueue::empty() {
  const std::lock_guard lock(mutex_);
  return events_.empty();
}

bool EventQueue::wait(std::chrono::duration<double> timeout) {
  std::unique_lock lock(mutex_);
  return queued_.wait_for(lock, timeout, [this] { return !events_.empty(); });
}

}  // namespace rkv
