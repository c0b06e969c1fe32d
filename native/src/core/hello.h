// SPDX-License-Identifier: Apache-2.0
/// First bytes on every connection between two engines.
///
/// The dialer proves that it knows the acceptor's endpoint (its token travels only inside the
/// descriptor); the acceptor answers with the dialer's token and so proves the same. Nothing else
/// is read from a connection before that.
#pragma once

#include <cstdint>

#include "core/endpoint_descriptor.h"
#include "core/types.h"

namespace rkv {

constexpr std::uint8_t kControlLane = 0;  ///< Data lanes are 1 to lane count.

struct Hello {
  static constexpr std::size_t kBytes = 48;

  std::uint8_t lane = 0;
  std::uint8_t lanes = 0;  ///< Data lanes that will follow, equal on all connections of a peer.
  Token acceptor{};
  Token dialer{};
  std::uint64_t dialer_incarnation = 0;

  [[nodiscard]] Bytes encode() const;
  /// @throw FormatError naming what is wrong.
  [[nodiscard]] static Hello decode(std::string_view bytes);
};

struct HelloReply {
  static constexpr std::size_t kBytes = 32;

  Token dialer{};
  std::uint64_t acceptor_incarnation = 0;

  [[nodiscard]] Bytes encode() const;
  /// @throw FormatError naming what is wrong.
  [[nodiscard]] static HelloReply decode(std::string_view bytes);
};

}  // namespace rkv
