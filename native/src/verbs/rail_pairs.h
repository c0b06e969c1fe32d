// SPDX-License-Identifier: Apache-2.0
/// Which port of the peer each of ours talks to.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "verbs/sysfs.h"

namespace rkv::verbs {

/// One end of a rail, as the other end must know it.
struct RailAddress {
  LinkLayer link_layer = LinkLayer::kUnknown;
  std::array<std::uint8_t, 16> gid{};
  Gid::Type gid_type = Gid::Type::kIb;
  std::uint16_t lid = 0;
  std::uint8_t mtu = 0;  ///< ibv_mtu of the port.
  double rate_gbps = 0;
  int subnet_bits = 0;  ///< Leading bits of the GID that its subnet shares: 64 on InfiniBand, 96 +
                        ///< 24 for IPv4 in a /24; 0 if not known.
};

struct RailPair {
  std::size_t own = 0;
  std::size_t other = 0;

  bool operator==(const RailPair&) const = default;
};

/// Who talks to whom. Both ends call this with their own rails first and get the same pairs in the
/// same order, each seen from its side.
///
/// Rails of one subnet pair up by position; the longer list wraps round the shorter, so that every
/// rail of a shared subnet is used, as evenly as can be. Rails whose subnet the other end lacks
/// stay idle: whether a router joins them is not known, and a pair that cannot connect fails the
/// whole peer. When no subnet is shared at all (every NIC in its own /31, say), position alone
/// decides.
/// @throw std::runtime_error when no rail of one end can talk to any of the other, naming both.
[[nodiscard]] std::vector<RailPair> pair_rails(std::span<const RailAddress> own,
                                               std::span<const RailAddress> other);

}  // namespace rkv::verbs
