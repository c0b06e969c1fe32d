// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <optional>
#include <string>

#include "core/config.h"
#include "core/event_loop.h"
#include "core/hello.h"
#include "core/socket.h"

namespace rkv {

/// The engine's one listening socket: reads hellos, refuses strangers, and hands authenticated
/// connections on. Progress thread only, except the constructor and address().
///
/// A hello that names one of our endpoints before the application called connect() for it is
/// parked, since both sides connect at their own time; everything else that is not a valid hello
/// within kHelloDeadline is closed and counted.
class Acceptor {
 public:
  using OnSocket = std::function<void(PeerId, std::uint8_t lane, UniqueFd)>;

  /// Listens at once. @throw std::runtime_error
  Acceptor(EventLoop& loop, const std::string& bind_host, std::uint64_t incarnation,
           OnSocket on_socket);
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  [[nodiscard]] const SocketAddress& address() const { return address_; }
  [[nodiscard]] std::uint64_t refused_hellos() const { return refused_; }

  /// From now on hellos to `token` are parked.
  void add_endpoint(const Token& token, PeerId peer);
  /// From now on `lanes` data lanes and a control lane of `remote` are accepted, parked ones too.
  void expect(const Token& token, const EndpointDescriptor& remote, std::uint8_t lanes);
  void remove_endpoint(const Token& token);
  /// Closes connections whose hello is overdue. Called every now and then.
  void expire(Clock::time_point now);

 private:
  struct Endpoint {
    PeerId peer = 0;
    bool expected = false;  ///< expect() was called; the fields below are set.
    Token remote_token{};
    std::uint64_t remote_incarnation = 0;
    std::uint8_t lanes = 0;
    std::uint32_t accepted_lanes = 0;  ///< Bit per lane.
  };
  struct Stranger {
    UniqueFd fd;
    Clock::time_point deadline;
    Bytes received = {};
    std::optional<Token> parked_for = {};  ///< The endpoint it named and waits for.
  };
  using Strangers = std::list<Stranger>;

  void accept_ready();
  void read_hello(Strangers::iterator stranger);
  void admit(Strangers::iterator stranger);
  void park(Strangers::iterator stranger, const Token& token);
  [[nodiscard]] Strangers::iterator find_parked(const Token& token);
  void refuse(Strangers::iterator stranger);
  void drop(Strangers::iterator stranger);

  EventLoop& loop_;
  std::uint64_t incarnation_;
  OnSocket on_socket_;
  SocketAddress address_;
  UniqueFd listener_;
  bool paused_ = false;  // no file descriptor is left to accept with
  Strangers strangers_;  // oldest first
  std::map<Token, Endpoint> endpoints_;
  std::uint64_t refused_ = 0;
};

}  // namespace rkv
