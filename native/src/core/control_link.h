// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <string_view>

#include "core/config.h"
#include "core/event_loop.h"
#include "core/types.h"

namespace rkv {

/// Largest message of Engine::send().
constexpr std::size_t kMaxMessageBytes = 1 << 20;

/// The control connection to one peer, under every backend: readiness, heartbeats, messages and
/// the reason of an orderly end. Progress thread only.
///
/// Heartbeats come from the progress thread itself: that is the thread whose life matters. The
/// kernel of a stopped process still answers keepalives, and a passive target of writes never
/// learns that its writer died; only silence on this link tells.
class ControlLink {
 public:
  enum class Type : std::uint8_t { kReady = 1, kHeartbeat = 2, kMessage = 3, kGoodbye = 4 };
  struct Callbacks {
    std::function<void()> on_ready;
    std::function<void(Bytes)> on_message;
    /// At most once; the link is closed by then. Must not destroy the link.
    std::function<void(std::string reason)> on_lost;
  };

  ControlLink(EventLoop& loop, UniqueFd fd, Callbacks callbacks);
  ~ControlLink();
  ControlLink(const ControlLink&) = delete;
  ControlLink& operator=(const ControlLink&) = delete;

  /// Queues one frame and sends what the socket takes. Frames arrive in order.
  void send(Type type, std::string_view body = {});
  /// Tries once to tell the peer why, then closes. No callback follows.
  void say_goodbye(std::string_view reason);
  /// The peer's goodbye if one has arrived: when the backend sees a broken connection first, the
  /// peer's own words are the better reason. Messages ahead of it are delivered.
  [[nodiscard]] std::string find_goodbye();

  [[nodiscard]] Clock::time_point last_heard() const { return last_heard_; }

 private:
  void on_ready(std::uint32_t epoll_events);
  void receive();
  void parse();
  void handle(Type type, std::string_view body);
  void flush();
  void watch_for(std::uint32_t epoll_events);
  void lose(std::string reason);
  void close();

  EventLoop& loop_;
  UniqueFd fd_;
  Callbacks callbacks_;
  Bytes received_;
  std::deque<Bytes> unsent_;
  std::size_t front_sent_ = 0;  // bytes of unsent_.front() that are out
  std::uint32_t watched_ = 0;
  std::string goodbye_;
  Clock::time_point last_heard_ = Clock::now();
};

}  // namespace rkv
