// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/types.h"

namespace rkv {

/// Joins each row with its successor when the two are adjacent on both sides and lie in the same
/// regions, then cuts the runs into slices of at most `block_size` bytes. Empty rows vanish; the
/// order of the rows is kept.
///
/// Below 32 KiB the cost of a transfer is per descriptor, so joining rows matters more than the
/// choice of backend.
[[nodiscard]] std::vector<WriteSlice> coalesce_and_slice(std::span<const WriteSlice> rows,
                                                         std::uint64_t block_size);

}  // namespace rkv
