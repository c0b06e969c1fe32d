// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/unique_fd.h"

namespace rkv {

struct SocketAddress {
  std::string host;  ///< Numeric.
  std::uint16_t port = 0;

  [[nodiscard]] std::string text() const { return host + ":" + std::to_string(port); }
};

/// A listening, non-blocking socket on `host` (a name or an address) and a port of the kernel's
/// choice, which is returned in `bound`. @throw std::runtime_error
[[nodiscard]] UniqueFd listen_on(const std::string& host, SocketAddress& bound);

/// Starts a non-blocking connect; the socket becomes writable when it is decided.
/// @throw std::runtime_error
[[nodiscard]] UniqueFd start_connect(const SocketAddress& address);

/// The pending SO_ERROR of a socket, 0 if none.
[[nodiscard]] int socket_error(int fd);

/// NODELAY, keepalive and TCP_USER_TIMEOUT, so that a lost node is seen within `peer_timeout`
/// whether the connection is idle or has data under way.
void set_liveness_options(int fd, std::chrono::milliseconds peer_timeout);

enum class IoStatus : std::uint8_t { kDone, kWouldBlock, kClosed };

struct IoResult {
  IoStatus status = IoStatus::kDone;
  std::size_t nbytes = 0;
  int error = 0;  ///< errno when kClosed; 0 means end of stream.

  /// "recv(): ECONNRESET (...)" or "end of stream".
  [[nodiscard]] std::string reason(std::string_view call) const;
};

/// One non-blocking recv/readv/sendmsg; EINTR is retried.
[[nodiscard]] IoResult receive_some(int fd, void* buffer, std::size_t nbytes);
[[nodiscard]] IoResult receive_some(int fd, const iovec* iov, std::size_t n);
[[nodiscard]] IoResult send_some(int fd, const void* buffer, std::size_t nbytes);
[[nodiscard]] IoResult send_some(int fd, iovec* iov, std::size_t n);

}  // namespace rkv
