// SPDX-License-Identifier: Apache-2.0
#include "core/checksum.h"

#include <array>
#include <bit>
#include <cstring>

namespace rkv {
namespace {

// Names and steps follow the XXH64 specification (xxhash_spec.md, version 0.1.1).
constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4F;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5;
constexpr std::size_t kStripe = 32;

template <class T>
T load(const unsigned char* from) {
  static_assert(std::endian::native == std::endian::little);
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::uint64_t round(std::uint64_t accumulator, std::uint64_t lane) {
  return std::rotl(accumulator + lane * kPrime2, 31) * kPrime1;
}

std::uint64_t merge(std::uint64_t accumulator, std::uint64_t lane_accumulator) {
  return (accumulator ^ round(0, lane_accumulator)) * kPrime1 + kPrime4;
}

std::uint64_t consume_stripes(const unsigned char*& at, const unsigned char* end) {
  std::array<std::uint64_t, 4> lanes{kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
  for (; static_cast<std::size_t>(end - at) >= kStripe; at += kStripe) {
    for (std::size_t i = 0; i < lanes.size(); ++i) {
      lanes[i] = round(lanes[i], load<std::uint64_t>(at + 8 * i));
    }
  }
  std::uint64_t accumulator = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) +
                              std::rotl(lanes[2], 12) + std::rotl(lanes[3], 18);
  for (const std::uint64_t lane : lanes) accumulator = merge(accumulator, lane);
  return accumulator;
}

std::uint64_t consume_tail(std::uint64_t accumulator, const unsigned char* at,
                           const unsigned char* end) {
  for (; end - at >= 8; at += 8) {
    accumulator =
        std::rotl(accumulator ^ round(0, load<std::uint64_t>(at)), 27) * kPrime1 + kPrime4;
  }
  if (end - at >= 4) {
    accumulator =
        std::rotl(accumulator ^ (load<std::uint32_t>(at) * kPrime1), 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at < end; ++at) accumulator = std::rotl(accumulator ^ (*at * kPrime5), 11) * kPrime1;
  return accumulator;
}

std::uint64_t avalanche(std::uint64_t accumulator) {
  accumulator = (accumulator ^ (accumulator >> 33)) * kPrime2;
  accumulator = (accumulator ^ (accumulator >> 29)) * kPrime3;
  return accumulator ^ (accumulator >> 32);
}

}  // namespace

std::uint64_t checksum64(const void* data, std::size_t nbytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  const unsigned char* end = at + nbytes;
  std::uint64_t accumulator = nbytes >= kStripe ? consume_stripes(at, end) : kPrime5;
  return avalanche(consume_tail(accumulator + nbytes, at, end));
}

}  // namespace rkv
