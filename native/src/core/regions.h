// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/types.h"

namespace rkv {

/// A contiguous piece of memory, here or at a peer.
struct MemoryRange {
  std::uint64_t address = 0;
  std::uint64_t nbytes = 0;

  /// No sum that could overflow.
  [[nodiscard]] bool contains(std::uint64_t first, std::uint64_t n) const {
    return first >= address && first - address <= nbytes && n <= nbytes - (first - address);
  }
  /// "[0x7f00, +4096)"
  [[nodiscard]] std::string text() const;
  [[nodiscard]] bool overlaps(const MemoryRange& other) const {
    return address < other.address + other.nbytes && other.address < address + nbytes;
  }
};

/// Immutable index from addresses to regions. Copied when it changes, so that write() may search
/// one without holding a lock.
class RegionIndex {
 public:
  struct Region {
    RegionId id;
    MemoryRange range;
  };

  RegionIndex() = default;
  /// Regions may overlap, as with verbs.
  explicit RegionIndex(std::vector<Region> regions);

  /// A region that holds all of [address, address + nbytes), or nothing. `hint` is the answer of
  /// the last call, for rows that stay in one region.
  [[nodiscard]] const Region* find(std::uint64_t address, std::uint64_t nbytes,
                                   const Region* hint) const;
  [[nodiscard]] RegionIndex with(Region region) const;
  [[nodiscard]] RegionIndex without(RegionId id) const;
  /// "3 regions: [0x7f00, +4096), ..." for error texts.
  [[nodiscard]] std::string describe() const;

 private:
  std::vector<Region> regions_;  // by address
};

/// What a peer must know to write into registered memory.
struct MemoryDescriptor {
  std::string backend;
  std::uint64_t incarnation = 0;
  MemoryRange range;
  Bytes blob;  ///< The backend's part: keys.

  [[nodiscard]] Bytes encode() const;
  /// @throw FormatError naming what is wrong.
  [[nodiscard]] static MemoryDescriptor decode(std::string_view bytes);
};

}  // namespace rkv
