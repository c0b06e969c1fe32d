// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace rkv {

/// NUMA node of the page at `address`, or -1 if it was never touched or the kernel knows no nodes.
[[nodiscard]] int numa_node(std::uint64_t address);

}  // namespace rkv
