// SPDX-License-Identifier: Apache-2.0
#include "core/dialer.h"

#include <sys/epoll.h>

#include <array>
#include <cerrno>
#include <utility>

#include "core/error.h"

namespace rkv {

Dialer::Dialer(EventLoop& loop, OnSocket on_socket, OnFailure on_failure)
    : loop_(loop), on_socket_(std::move(on_socket)), on_failure_(std::move(on_failure)) {}

Dialer::~Dialer() {
  for (const Call& call : calls_) loop_.unwatch(call.fd.get());
}

void Dialer::dial(PeerId peer, const EndpointDescriptor& remote, const Hello& hello) {
  const SocketAddress address{remote.host, remote.port};
  const auto call = calls_.insert(
      calls_.end(), {peer, remote.incarnation, address, hello, start_connect(address)});
  loop_.watch(call->fd.get(), EPOLLOUT, [this, call](std::uint32_t) { on_ready(call); });
}

void Dialer::cancel(PeerId peer) {
  std::erase_if(calls_, [&](const Call& call) {
    if (call.peer == peer) loop_.unwatch(call.fd.get());
    return call.peer == peer;
  });
}

void Dialer::on_ready(Calls::iterator call) {
  if (call->greeted) {
    read_reply(call);
  } else {
    greet(call);
  }
}

void Dialer::greet(Calls::iterator call) {
  const int error = socket_error(call->fd.get());
  if (error != 0) {
    fail(call, call_error("connect", error, "is the peer's engine still running?"));
    return;
  }
  const Bytes hello = call->hello.encode();
  // An empty socket buffer takes 48 bytes whole.
  const IoResult sent = send_some(call->fd.get(), hello.data(), hello.size());
  if (sent.nbytes != hello.size()) {
    fail(call, sent.reason("send(hello)"));
    return;
  }
  call->greeted = true;
  loop_.change(call->fd.get(), EPOLLIN);
}

void Dialer::read_reply(Calls::iterator call) {
  std::array<char, HelloReply::kBytes> buffer;
  const IoResult got =
      receive_some(call->fd.get(), buffer.data(), HelloReply::kBytes - call->received.size());
  if (got.status == IoStatus::kWouldBlock) return;
  if (got.status == IoStatus::kClosed) {
    fail(call, got.error != 0 && got.error != ECONNRESET
                   ? call_error("recv(hello reply)", got.error)
                   : "it refused our hello; its endpoint is closed or its engine was restarted");
    return;
  }
  call->received.append(buffer.data(), got.nbytes);
  if (call->received.size() < HelloReply::kBytes) return;
  try {
    const HelloReply reply = HelloReply::decode(call->received);
    if (reply.dialer != call->hello.dialer ||
        reply.acceptor_incarnation != call->remote_incarnation) {
      throw FormatError("does not know this endpoint (wrong token or incarnation)");
    }
  } catch (const FormatError& error) {
    fail(call, std::string("its hello reply: ") + error.what());
    return;
  }
  loop_.unwatch(call->fd.get());
  Call done = std::move(*call);
  calls_.erase(call);
  on_socket_(done.peer, done.hello.lane, std::move(done.fd));
}

void Dialer::fail(Calls::iterator call, const std::string& why) {
  const PeerId peer = call->peer;
  const std::string address = call->address.text();
  cancel(peer);  // all lanes fall together
  on_failure_(peer, "cannot connect to " + address + ": " + why);
}

}  // namespace rkv
