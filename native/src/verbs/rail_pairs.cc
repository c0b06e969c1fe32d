// SPDX-License-Identifier: Apache-2.0
#include "verbs/rail_pairs.h"

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

namespace rkv::verbs {
namespace {

/// Rails of different fabrics cannot talk: the kernel resolves a RoCE peer only for GIDs of one
/// type and one address family.
std::string fabric(const RailAddress& rail) {
  if (rail.link_layer != LinkLayer::kEthernet) return link_layer_name(rail.link_layer);
  if (rail.gid_type != Gid::Type::kRoceV2) return "RoCE v1";
  return Gid{.raw = rail.gid}.ipv4_mapped() ? "RoCE v2 over IPv4" : "RoCE v2 over IPv6";
}

/// The fabric and the subnet's bits of the GID; empty if the subnet is not known.
std::string subnet(const RailAddress& rail) {
  if (rail.subnet_bits <= 0) return "";
  std::string key = fabric(rail) + "/" + std::to_string(rail.subnet_bits) + "/";
  for (int byte = 0, bits = rail.subnet_bits; byte < 16; ++byte, bits -= 8) {
    const unsigned mask = 0xff00U >> std::clamp(bits, 0, 8);
    key += static_cast<char>(rail.gid[static_cast<std::size_t>(byte)] & mask);
  }
  return key;
}

/// Positions of the rails by what they must share with a peer's. Ordered by that, so that both ends
/// see the same order.
using Groups = std::map<std::string, std::vector<std::size_t>>;

Groups group(std::span<const RailAddress> rails, std::string (*key_of)(const RailAddress&)) {
  Groups groups;
  for (std::size_t i = 0; i < rails.size(); ++i) groups[key_of(rails[i])].push_back(i);
  groups.erase("");
  return groups;
}

std::vector<RailPair> pair_groups(const Groups& own, const Groups& other) {
  std::vector<RailPair> pairs;
  for (const auto& [key, a] : own) {
    const auto found = other.find(key);
    if (found == other.end()) continue;
    const std::vector<std::size_t>& b = found->second;
    for (std::size_t i = 0; i < std::max(a.size(), b.size()); ++i) {
      pairs.push_back({a[i % a.size()], b[i % b.size()]});
    }
  }
  return pairs;
}

std::string fabrics(std::span<const RailAddress> rails) {
  std::set<std::string> names;
  for (const RailAddress& rail : rails) names.insert(fabric(rail));
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : " and ") + name;
  return text.empty() ? "missing" : text;
}

}  // namespace

std::vector<RailPair> pair_rails(std::span<const RailAddress> own,
                                 std::span<const RailAddress> other) {
  for (const auto key_of : {subnet, fabric}) {
    std::vector<RailPair> pairs = pair_groups(group(own, key_of), group(other, key_of));
    if (!pairs.empty()) return pairs;
  }
  throw std::runtime_error("no RDMA port here can talk to one of the peer: ours are " +
                           fabrics(own) + ", the peer's are " + fabrics(other) +
                           "; set devices and gid_index so that both ends use the same");
}

}  // namespace rkv::verbs
