// SPDX-License-Identifier: Apache-2.0
#include "verbs/subnet.h"

#include <ifaddrs.h>
#include <netinet/in.h>

#include <bit>
#include <cstring>
#include <memory>

namespace rkv::verbs {
namespace {

constexpr int kIpv4Offset = 96;        ///< Bits of ::ffff:0:0/96.
constexpr std::size_t kIpv4Byte = 12;  ///< Where the IPv4 address starts in a mapped GID.

template <class Integer>
int leading_ones(const Integer* bytes, std::size_t n) {
  int bits = 0;
  for (std::size_t i = 0; i < n; ++i) bits += std::popcount(bytes[i]);
  return bits;
}

int bits_on(const ifaddrs& entry, const Gid& gid) {
  if (entry.ifa_addr == nullptr || entry.ifa_netmask == nullptr) return 0;
  if (entry.ifa_addr->sa_family == AF_INET && gid.ipv4_mapped()) {
    const auto& address = reinterpret_cast<const sockaddr_in*>(entry.ifa_addr)->sin_addr;
    const auto& mask = reinterpret_cast<const sockaddr_in*>(entry.ifa_netmask)->sin_addr;
    if (std::memcmp(&address, gid.raw.data() + kIpv4Byte, sizeof address) != 0) return 0;
    return kIpv4Offset + leading_ones(&mask.s_addr, 1);
  }
  if (entry.ifa_addr->sa_family == AF_INET6) {
    const auto& address = reinterpret_cast<const sockaddr_in6*>(entry.ifa_addr)->sin6_addr;
    const auto& mask = reinterpret_cast<const sockaddr_in6*>(entry.ifa_netmask)->sin6_addr;
    if (std::memcmp(&address, gid.raw.data(), gid.raw.size()) != 0) return 0;
    return leading_ones(mask.s6_addr, gid.raw.size());
  }
  return 0;
}

}  // namespace

int subnet_bits(const Gid& gid) {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return 0;
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> owner(list, &freeifaddrs);
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (const int bits = bits_on(*entry, gid)) return bits;
  }
  return 0;
}

}  // namespace rkv::verbs
