// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "verbs/sysfs.h"

namespace rkv::verbs {

/// Sets `gid` to the one to use of an ACTIVE port and returns "", or returns why there is none, to
/// follow the port's name in a sentence. `gid_index` -1 chooses: on InfiniBand slot 0; on Ethernet
/// RoCE v2 with an IPv4-mapped address, then global IPv6, then link-local, then RoCE v1; of one
/// kind those without a VLAN first; never one whose netdev is down.
[[nodiscard]] std::string choose_gid(const Port& port, int gid_index, Gid& gid);

}  // namespace rkv::verbs
