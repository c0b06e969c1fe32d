// SPDX-License-Identifier: Apache-2.0
#include "core/acceptor.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "core/error.h"

namespace rkv {
namespace {

constexpr std::chrono::seconds kHelloDeadline{5};
/// Connections that have not proved anything yet. One more closes the oldest, so that strangers
/// who never finish their hello cannot keep a real peer out.
constexpr std::size_t kMaxStrangers = 64;
constexpr std::size_t kMaxLanes = 32;

}  // namespace

Acceptor::Acceptor(EventLoop& loop, const std::string& bind_host, std::uint64_t incarnation,
                   OnSocket on_socket)
    : loop_(loop),
      incarnation_(incarnation),
      on_socket_(std::move(on_socket)),
      listener_(listen_on(bind_host, address_)) {
  loop_.watch(listener_.get(), EPOLLIN, [this](std::uint32_t) { accept_ready(); });
}

Acceptor::~Acceptor() {
  loop_.unwatch(listener_.get());
  while (!strangers_.empty()) drop(strangers_.begin());
}

void Acceptor::accept_ready() {
  // One per turn: a flood of connections must not hold up the data path.
  UniqueFd fd(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!fd) {
    // Out of file descriptors the listener stays readable; without a pause the loop would spin.
    paused_ = errno == EMFILE || errno == ENFILE;
    if (paused_) loop_.change(listener_.get(), 0);
    return;
  }
  const auto unproven = std::count_if(strangers_.begin(), strangers_.end(),
                                      [](const Stranger& s) { return !s.parked_for; });
  if (static_cast<std::size_t>(unproven) >= kMaxStrangers) {
    refuse(std::find_if(strangers_.begin(), strangers_.end(),
                        [](const Stranger& s) { return !s.parked_for; }));
  }
  const auto stranger =
      strangers_.insert(strangers_.end(), {std::move(fd), Clock::now() + kHelloDeadline});
  loop_.watch(stranger->fd.get(), EPOLLIN | EPOLLRDHUP,
              [this, stranger](std::uint32_t) { read_hello(stranger); });
}

void Acceptor::read_hello(Strangers::iterator stranger) {
  if (stranger->parked_for) {
    // A dialer that waits for our reply says nothing; this is its end, or a protocol error.
    drop(stranger);
    return;
  }
  std::array<char, Hello::kBytes> buffer;
  const IoResult got =
      receive_some(stranger->fd.get(), buffer.data(), Hello::kBytes - stranger->received.size());
  if (got.status == IoStatus::kWouldBlock) return;
  if (got.status == IoStatus::kClosed) {
    refuse(stranger);
    return;
  }
  stranger->received.append(buffer.data(), got.nbytes);
  if (stranger->received.size() == Hello::kBytes) admit(stranger);
}

void Acceptor::admit(Strangers::iterator stranger) {
  Hello hello;
  try {
    hello = Hello::decode(stranger->received);
  } catch (const FormatError&) {
    refuse(stranger);
    return;
  }
  const auto found = endpoints_.find(hello.acceptor);
  if (found == endpoints_.end()) {
    refuse(stranger);
    return;
  }
  Endpoint& endpoint = found->second;
  if (!endpoint.expected) {
    park(stranger, hello.acceptor);
    return;
  }
  const std::uint32_t lane_bit = 1U << (hello.lane % kMaxLanes);
  const bool known = hello.dialer == endpoint.remote_token &&
                     hello.dialer_incarnation == endpoint.remote_incarnation &&
                     hello.lanes == endpoint.lanes && hello.lane <= endpoint.lanes &&
                     (endpoint.accepted_lanes & lane_bit) == 0;
  const Bytes reply = HelloReply{hello.dialer, incarnation_}.encode();
  // An empty socket buffer takes 32 bytes whole; a socket that does not is broken.
  if (!known || send_some(stranger->fd.get(), reply.data(), reply.size()).nbytes != reply.size()) {
    refuse(stranger);
    return;
  }
  endpoint.accepted_lanes |= lane_bit;
  loop_.unwatch(stranger->fd.get());
  UniqueFd fd = std::move(stranger->fd);
  strangers_.erase(stranger);
  on_socket_(endpoint.peer, hello.lane, std::move(fd));
}

void Acceptor::park(Strangers::iterator stranger, const Token& token) {
  // The token bounds the number: a peer opens at most kMaxLanes connections per endpoint.
  const auto parked = std::count_if(strangers_.begin(), strangers_.end(),
                                    [&](const Stranger& s) { return s.parked_for == token; });
  if (static_cast<std::size_t>(parked) >= kMaxLanes) {
    refuse(stranger);
    return;
  }
  stranger->parked_for = token;
}

Acceptor::Strangers::iterator Acceptor::find_parked(const Token& token) {
  return std::find_if(strangers_.begin(), strangers_.end(),
                      [&](const Stranger& s) { return s.parked_for == token; });
}

void Acceptor::refuse(Strangers::iterator stranger) {
  ++refused_;
  drop(stranger);
}

void Acceptor::drop(Strangers::iterator stranger) {
  loop_.unwatch(stranger->fd.get());
  strangers_.erase(stranger);
}

void Acceptor::add_endpoint(const Token& token, PeerId peer) { endpoints_[token].peer = peer; }

void Acceptor::expect(const Token& token, const EndpointDescriptor& remote, std::uint8_t lanes) {
  Endpoint& endpoint = endpoints_.at(token);
  endpoint.expected = true;
  endpoint.remote_token = remote.token;
  endpoint.remote_incarnation = remote.incarnation;
  endpoint.lanes = lanes;
  // Searched anew each time: what admit() calls may remove this endpoint and its strangers.
  for (auto it = find_parked(token); it != strangers_.end(); it = find_parked(token)) admit(it);
}

void Acceptor::remove_endpoint(const Token& token) {
  endpoints_.erase(token);
  for (auto it = find_parked(token); it != strangers_.end(); it = find_parked(token)) drop(it);
}

void Acceptor::expire(Clock::time_point now) {
  if (std::exchange(paused_, false)) loop_.change(listener_.get(), EPOLLIN);
  for (auto it = strangers_.begin(); it != strangers_.end();) {
    const auto stranger = it++;
    if (!stranger->parked_for && now >= stranger->deadline) refuse(stranger);
  }
}

}  // namespace rkv
