// SPDX-License-Identifier: Apache-2.0
#include "core/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>

#include "core/error.h"

namespace rkv {
namespace {

/// Covers bandwidth x round trip of 100 Gb/s x 50 us with room; on loopback 208 KiB to 4 MiB are
/// equal within noise. The kernel clamps it to net.core.{w,r}mem_max.
constexpr int kSocketBufferBytes = 1 << 20;
constexpr int kListenBacklog = 256;
constexpr int kKeepaliveProbes = 3;

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

AddressList resolve(const std::string& host, const std::string& port, int flags) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int status = getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
  if (status != 0) {
    throw std::runtime_error("getaddrinfo(" + host + "): " + gai_strerror(status) +
                             "; set bind_host to an address of this node");
  }
  return {found, freeaddrinfo};
}

void set_option(int fd, int level, int name, int value, const char* call) {
  if (setsockopt(fd, level, name, &value, sizeof value) != 0) throw_errno(call, errno);
}

UniqueFd open_socket(const addrinfo& address) {
  UniqueFd fd(socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) throw_errno("socket", errno, "raise `ulimit -n`");
  // Before connect and listen, so that the window scale fits.
  set_option(fd.get(), SOL_SOCKET, SO_SNDBUF, kSocketBufferBytes, "setsockopt(SO_SNDBUF)");
  set_option(fd.get(), SOL_SOCKET, SO_RCVBUF, kSocketBufferBytes, "setsockopt(SO_RCVBUF)");
  return fd;
}

SocketAddress local_address(int fd) {
  sockaddr_storage storage{};
  socklen_t length = sizeof storage;
  auto* address = reinterpret_cast<sockaddr*>(&storage);
  if (getsockname(fd, address, &length) != 0) throw_errno("getsockname", errno);
  std::array<char, NI_MAXHOST> host{};
  std::array<char, NI_MAXSERV> port{};
  const int status = getnameinfo(address, length, host.data(), host.size(), port.data(),
                                 port.size(), NI_NUMERICHOST | NI_NUMERICSERV);
  if (status != 0) throw std::runtime_error(std::string("getnameinfo: ") + gai_strerror(status));
  return {host.data(), static_cast<std::uint16_t>(std::stoi(port.data()))};
}

IoResult io_result(ssize_t n, bool zero_is_end) {
  if (n > 0 || (n == 0 && !zero_is_end)) return {IoStatus::kDone, static_cast<std::size_t>(n), 0};
  if (n == 0) return {IoStatus::kClosed, 0, 0};
  if (errno == EAGAIN || errno == EWOULDBLOCK) return {IoStatus::kWouldBlock, 0, 0};
  return {IoStatus::kClosed, 0, errno};
}

template <class Call>
ssize_t retry_interrupted(Call call) {
  ssize_t n = 0;
  do {
    n = call();
  } while (n < 0 && errno == EINTR);
  return n;
}

}  // namespace

UniqueFd listen_on(const std::string& host, SocketAddress& bound) {
  const AddressList address = resolve(host, "0", AI_PASSIVE);
  UniqueFd fd = open_socket(*address);
  if (bind(fd.get(), address->ai_addr, address->ai_addrlen) != 0) {
    throw_errno("bind(" + host + ":0)", errno, "set bind_host to an address of this node");
  }
  if (listen(fd.get(), kListenBacklog) != 0) throw_errno("listen(" + host + ")", errno);
  bound = local_address(fd.get());
  return fd;
}

UniqueFd start_connect(const SocketAddress& peer) {
  const AddressList address = resolve(peer.host, std::to_string(peer.port), AI_NUMERICHOST);
  UniqueFd fd = open_socket(*address);
  const ssize_t status =
      retry_interrupted([&] { return connect(fd.get(), address->ai_addr, address->ai_addrlen); });
  if (status != 0 && errno != EINPROGRESS) throw_errno("connect(" + peer.text() + ")", errno);
  return fd;
}

int socket_error(int fd) {
  int error = 0;
  socklen_t length = sizeof error;
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0) return errno;
  return error;
}

void set_liveness_options(int fd, std::chrono::milliseconds peer_timeout) {
  const auto milliseconds = static_cast<int>(peer_timeout.count());
  const int interval_s = std::max(1, milliseconds / 1000 / (kKeepaliveProbes + 1));
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1, "setsockopt(TCP_NODELAY)");
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1, "setsockopt(SO_KEEPALIVE)");
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, interval_s, "setsockopt(TCP_KEEPIDLE)");
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, interval_s, "setsockopt(TCP_KEEPINTVL)");
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, kKeepaliveProbes, "setsockopt(TCP_KEEPCNT)");
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, milliseconds, "setsockopt(TCP_USER_TIMEOUT)");
}

std::string IoResult::reason(std::string_view call) const {
  if (error == 0) return "end of stream (the peer's process or its engine is gone)";
  if (error == ETIMEDOUT) {  // TCP_USER_TIMEOUT, see set_liveness_options()
    return call_error(call, error,
                      "nothing acknowledged for peer_timeout_s: the peer's node is unreachable");
  }
  return call_error(call, error);
}

IoResult receive_some(int fd, void* buffer, std::size_t nbytes) {
  return io_result(retry_interrupted([&] { return recv(fd, buffer, nbytes, 0); }), true);
}

IoResult receive_some(int fd, const iovec* iov, std::size_t n) {
  return io_result(retry_interrupted([&] { return readv(fd, iov, static_cast<int>(n)); }), true);
}

IoResult send_some(int fd, const void* buffer, std::size_t nbytes) {
  return io_result(retry_interrupted([&] { return send(fd, buffer, nbytes, MSG_NOSIGNAL); }),
                   false);
}

IoResult send_some(int fd, iovec* iov, std::size_t n) {
  msghdr message{};
  message.msg_iov = iov;
  message.msg_iovlen = n;
  // Not writev: it cannot suppress SIGPIPE.
  return io_result(retry_interrupted([&] { return sendmsg(fd, &message, MSG_NOSIGNAL); }), false);
}

}  // namespace rkv
