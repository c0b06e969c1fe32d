// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "verbs/sysfs.h"

namespace rkv::verbs {

/// Leading bits of the GID that its subnet shares, from the netmask of the netdev that has the
/// address: 120 for an IPv4 address in a /24. 0 if no netdev has it.
[[nodiscard]] int subnet_bits(const Gid& gid);

}  // namespace rkv::verbs
