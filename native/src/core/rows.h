// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/regions.h"
#include "core/types.h"

namespace rkv {

/// The columns of write(), of equal length: addresses here, addresses at the peer, bytes.
struct Rows {
  std::span<const std::int64_t> local;
  std::span<const std::int64_t> remote;
  std::span<const std::int64_t> nbytes;
};

/// Looks up the regions of every row and appends the coalesced slices to `slices`.
/// @throw std::invalid_argument naming the first bad row.
void slice_rows(const Rows& rows, const RegionIndex& local_regions,
                const RegionIndex& remote_regions, std::uint64_t block_size,
                std::vector<WriteSlice>& slices);

}  // namespace rkv
