// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <string>

#include "core/event_loop.h"
#include "core/hello.h"
#include "core/socket.h"

namespace rkv {

/// Opens connections to peers and says hello on them. Progress thread only.
///
/// The engine bounds the time: it calls cancel() when connect_timeout_s is up.
class Dialer {
 public:
  using OnSocket = std::function<void(PeerId, std::uint8_t lane, UniqueFd)>;
  using OnFailure = std::function<void(PeerId, std::string reason)>;

  Dialer(EventLoop& loop, OnSocket on_socket, OnFailure on_failure);
  ~Dialer();
  Dialer(const Dialer&) = delete;
  Dialer& operator=(const Dialer&) = delete;

  /// Dials one lane of `peer`. Either callback follows, never from within this call.
  /// @throw std::runtime_error
  void dial(PeerId peer, const EndpointDescriptor& remote, const Hello& hello);
  void cancel(PeerId peer);

 private:
  struct Call {
    PeerId peer;
    std::uint64_t remote_incarnation;
    SocketAddress address;
    Hello hello;
    UniqueFd fd;
    bool greeted = false;
    Bytes received = {};
  };
  using Calls = std::list<Call>;

  void on_ready(Calls::iterator call);
  void greet(Calls::iterator call);
  void read_reply(Calls::iterator call);
  void fail(Calls::iterator call, const std::string& why);

  EventLoop& loop_;
  OnSocket on_socket_;
  OnFailure on_failure_;
  Calls calls_;
};

}  // namespace rkv
