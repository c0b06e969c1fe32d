// SPDX-License-Identifier: Apache-2.0
#include "core/event_loop.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "core/error.h"

namespace rkv {
namespace {

constexpr std::uint64_t kWakeSerial = 0;
constexpr int kEventsPerWait = 64;  ///< A later call returns the rest.

}  // namespace

EventLoop::EventLoop()
    : epoll_(epoll_create1(EPOLL_CLOEXEC)), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!epoll_ || !wake_) throw_errno("epoll_create1/eventfd", errno, "raise `ulimit -n`");
  control(EPOLL_CTL_ADD, wake_.get(), EPOLLIN, kWakeSerial);
}

bool EventLoop::queue(Command command) {
  const std::lock_guard lock(mutex_);
  commands_.push_back(std::move(command));
  has_commands_.store(true, std::memory_order_release);
  return sleeping_;
}

void EventLoop::wake() {
  bool asleep = false;
  {
    const std::lock_guard lock(mutex_);
    // One ring is enough: whoever calls next finds sleeping_ false.
    asleep = std::exchange(sleeping_, false);
  }
  if (asleep) eventfd_write(wake_.get(), 1);
}

void EventLoop::control(int operation, int fd, std::uint32_t epoll_events, std::uint64_t serial) {
  epoll_event event{.events = epoll_events, .data = {.u64 = serial}};
  if (epoll_ctl(epoll_.get(), operation, fd, &event) != 0) throw_errno("epoll_ctl", errno);
}

void EventLoop::watch(int fd, std::uint32_t epoll_events, Handler handler) {
  const std::uint64_t serial = next_serial_++;
  control(EPOLL_CTL_ADD, fd, epoll_events, serial);
  by_serial_[serial] = std::make_shared<Handler>(std::move(handler));
  serial_of_[fd] = serial;
}

void EventLoop::change(int fd, std::uint32_t epoll_events) {
  control(EPOLL_CTL_MOD, fd, epoll_events, serial_of_.at(fd));
}

void EventLoop::unwatch(int fd) {
  const auto found = serial_of_.find(fd);
  if (found == serial_of_.end()) return;
  control(EPOLL_CTL_DEL, fd, 0, 0);
  by_serial_.erase(found->second);
  serial_of_.erase(found);
}

EventLoop::Ran EventLoop::run_once(std::chrono::nanoseconds max_wait,
                                   std::unique_lock<Turn>& turn) {
  const bool ran = run_commands();
  const bool sleeps = !ran && max_wait.count() > 0 && begin_sleep();
  if (sleeps) {
    turn.unlock();
    // Not epoll_wait(), which counts in milliseconds, nor epoll_pwait2(), which needs glibc 2.35.
    pollfd ready_set{.fd = epoll_.get(), .events = POLLIN, .revents = 0};
    const timespec wait{.tv_sec = max_wait.count() / 1'000'000'000,
                        .tv_nsec = max_wait.count() % 1'000'000'000};
    (void)ppoll(&ready_set, 1, &wait, nullptr);
  }
  std::array<epoll_event, kEventsPerWait> ready;
  const int n = epoll_wait(epoll_.get(), ready.data(), kEventsPerWait, 0);
  if (sleeps) {
    end_sleep();
    turn.lock();
  }
  for (int i = 0; i < n; ++i) {
    const epoll_event& event = ready[static_cast<std::size_t>(i)];
    dispatch(event.data.u64, event.events);
  }
  return {.commands = ran, .handlers = n > 0};
}

void EventLoop::dispatch(std::uint64_t serial, std::uint32_t epoll_events) {
  if (serial == kWakeSerial) {
    eventfd_t rings = 0;
    eventfd_read(wake_.get(), &rings);
    ++wakeups_;
    return;
  }
  // A handler of this very batch may have unwatched the fd, and its number may be in use again;
  // the serial is not. The copy keeps a handler alive that unwatches itself.
  const auto found = by_serial_.find(serial);
  if (found == by_serial_.end()) return;
  const std::shared_ptr<Handler> handler = found->second;
  (*handler)(epoll_events);
}

bool EventLoop::run_commands() {
  if (!has_commands_.load(std::memory_order_acquire)) return false;
  {
    const std::lock_guard lock(mutex_);
    running_.swap(commands_);
    has_commands_.store(false, std::memory_order_relaxed);
  }
  for (Command& command : running_) command();
  running_.clear();
  return true;
}

bool EventLoop::begin_sleep() {
  const std::lock_guard lock(mutex_);
  sleeping_ = commands_.empty();
  return sleeping_;
}

void EventLoop::end_sleep() {
  const std::lock_guard lock(mutex_);
  sleeping_ = false;
}

}  // namespace rkv
