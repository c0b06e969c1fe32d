// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/regions.h"
#include "core/types.h"
#include "core/wire.h"

namespace rkv::verbs {

/// Keys of one registered region on one rail: one for each chunk of `chunk_bytes`, the last chunk
/// may be shorter. Devices limit the size of an MR (max_mr_size).
struct RegionKeys {
  std::uint64_t base = 0;  ///< Address of the region.
  std::uint64_t chunk_bytes = 0;
  std::vector<std::uint32_t> keys = {};
  bool cpu_readable = true;  ///< Of local memory: the CPU can read it, so it can be sent inline.

  [[nodiscard]] std::uint32_t key(std::uint64_t address) const {
    return keys.size() == 1 ? keys.front() : keys[(address - base) / chunk_bytes];
  }
  /// Bytes from `address` to where the next key begins.
  [[nodiscard]] std::uint64_t same_key_bytes(std::uint64_t address) const {
    return keys.size() == 1 ? UINT64_MAX : chunk_bytes - (address - base) % chunk_bytes;
  }

  /// All but `base`, which the memory's descriptor holds.
  void encode(ByteWriter& writer) const;
  /// @throw FormatError unless the keys cover `range` exactly.
  [[nodiscard]] static RegionKeys decode(ByteReader& reader, const MemoryRange& range);
};

/// Keys of every region on one rail.
using KeysByRegion = std::unordered_map<RegionId, RegionKeys>;

}  // namespace rkv::verbs
