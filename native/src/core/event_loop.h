// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/turn.h"
#include "core/unique_fd.h"

namespace rkv {

/// One epoll instance and a queue of commands: everything that the engine reacts to.
///
/// queue(), wake() and post() may be called from any thread. The rest belongs to whoever has the
/// turn (see Progress), but for run_once(), which is the progress thread's.
class EventLoop {
 public:
  using Command = std::function<void()>;
  using Handler = std::function<void(std::uint32_t epoll_events)>;
  struct Ran {
    bool commands = false;
    bool handlers = false;
  };

  /// @throw std::runtime_error when epoll or eventfd are refused.
  EventLoop();

  /// Queues `command` for the next turn. @return whether the progress thread sleeps: then the
  /// caller takes that turn, or wakes it.
  bool queue(Command command);
  void wake();
  void post(Command command) {
    if (queue(std::move(command))) wake();
  }

  /// Calls `handler` while `fd` has one of `epoll_events` (level-triggered). The caller keeps
  /// owning `fd` and calls unwatch() before closing it; a handler may unwatch any fd, its own too.
  void watch(int fd, std::uint32_t epoll_events, Handler handler);
  void change(int fd, std::uint32_t epoll_events);
  void unwatch(int fd);

  /// Runs what is due: commands first, then ready file descriptors. Blocks for at most `max_wait`
  /// when nothing is, and leaves the turn to others meanwhile.
  Ran run_once(std::chrono::nanoseconds max_wait, std::unique_lock<Turn>& turn);

  /// Runs the commands queued by now. @return whether there were any.
  bool run_commands();

  /// Times that the progress thread was woken (the software doorbell).
  [[nodiscard]] std::uint64_t wakeups() const { return wakeups_; }

 private:
  bool begin_sleep();
  void end_sleep();
  void dispatch(std::uint64_t serial, std::uint32_t epoll_events);
  void control(int operation, int fd, std::uint32_t epoll_events, std::uint64_t serial);

  UniqueFd epoll_;
  UniqueFd wake_;
  std::uint64_t next_serial_ = 1;
  std::unordered_map<std::uint64_t, std::shared_ptr<Handler>> by_serial_;
  std::unordered_map<int, std::uint64_t> serial_of_;
  std::vector<Command> running_;
  std::uint64_t wakeups_ = 0;

  std::atomic<bool> has_commands_ = false;  // so that a busy poller takes no lock to find none
  std::mutex mutex_;                        // guards the two below
  std::vector<Command> commands_;
  bool sleeping_ = false;
};

}  // namespace rkv
