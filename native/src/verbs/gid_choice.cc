// SPDX-License-Identifier: Apache-2.0
#include "verbs/gid_choice.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace rkv::verbs {
namespace {

/// Smaller is better: a routed address reaches more peers, and RoCE v1 cannot be routed at all.
auto gid_order(const Gid& gid) {
  int kind = 3;
  if (gid.type == Gid::Type::kRoceV2) kind = gid.ipv4_mapped() ? 0 : gid.link_local() ? 2 : 1;
  return std::tuple(kind, gid.vlan, gid.index);
}

/// "0 = fe80::1 (RoCE v2, eth0), 1 = ..."
std::string gid_list(const Port& port) {
  std::string list;
  for (const Gid& gid : port.gids) {
    list += (list.empty() ? "" : ", ") + std::to_string(gid.index) + " = " + gid.text();
  }
  return list.empty() ? "none" : list;
}

std::string find_wanted(const Port& port, int gid_index, Gid& gid) {
  const auto found = std::ranges::find(port.gids, gid_index, &Gid::index);
  const std::string wanted = " GID " + std::to_string(gid_index);
  const std::string remedy = "; set gid_index to -1 or to one that can be used: " + gid_list(port);
  if (gid_index >= port.gid_slots) {
    return " has no" + wanted + " in its " + std::to_string(port.gid_slots) + " slots" + remedy;
  }
  if (found == port.gids.end()) return " has an empty" + wanted + remedy;
  if (found->netdev_down)
    return " has" + wanted + " on " + found->netdev + ", which is down" + remedy;
  gid = *found;
  return "";
}

}  // namespace

std::string choose_gid(const Port& port, int gid_index, Gid& gid) {
  if (gid_index >= 0) return find_wanted(port, gid_index, gid);
  if (port.link_layer == LinkLayer::kInfiniBand) {
    // Slot 0 always holds the port's own GID; within a subnet the LID is what routes.
    if (!port.gids.empty() && port.gids.front().index == 0) gid = port.gids.front();
    return "";
  }
  const auto best = std::ranges::min_element(
      port.gids, {}, [](const Gid& slot) { return std::pair(slot.netdev_down, gid_order(slot)); });
  if (best == port.gids.end() || best->netdev_down) {
    return " has no usable GID (" + gid_list(port) +
           "); give its netdev an address with `ip address add` and bring it up with `ip link set`";
  }
  gid = *best;
  return "";
}

}  // namespace rkv::verbs
