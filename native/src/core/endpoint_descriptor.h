// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>

#include "core/types.h"

namespace rkv {

/// Names one endpoint and proves the right to connect to it: 128 random bits.
using Token = std::array<std::uint8_t, 16>;

/// @throw std::runtime_error when the kernel has no randomness to give.
[[nodiscard]] Token random_token();
[[nodiscard]] std::uint64_t random_u64();

/// What a peer must know to connect to one endpoint of this engine.
struct EndpointDescriptor {
  std::string backend = {};
  std::uint64_t incarnation = 0;
  Token token{};
  std::string host = {};  ///< Numeric address of the engine's listening socket.
  std::uint16_t port = 0;
  std::uint8_t lanes = 0;  ///< Data connections that this side wants; the smaller number wins.
  Bytes blob = {};         ///< The backend's part.

  [[nodiscard]] Bytes encode() const;
  /// @throw FormatError naming what is wrong.
  [[nodiscard]] static EndpointDescriptor decode(std::string_view bytes);

  /// Of two endpoints the smaller one dials, so that both sides agree without talking.
  [[nodiscard]] bool dials(const EndpointDescriptor& other) const {
    return std::tie(incarnation, token) < std::tie(other.incarnation, other.token);
  }
};

}  // namespace rkv
