// SPDX-License-Identifier: Apache-2.0
#include "verbs/region_keys.h"

namespace rkv::verbs {

void RegionKeys::encode(ByteWriter& writer) const {
  writer.put(chunk_bytes);
  writer.put(static_cast<std::uint32_t>(keys.size()));
  for (const std::uint32_t key : keys) writer.put(key);
}

RegionKeys RegionKeys::decode(ByteReader& reader, const MemoryRange& range) {
  RegionKeys region{.base = range.address};
  region.chunk_bytes = reader.get<std::uint64_t>("chunk size");
  const auto count = reader.get<std::uint32_t>("number of rkeys");
  if (region.chunk_bytes == 0 || range.nbytes == 0 ||
      count != (range.nbytes - 1) / region.chunk_bytes + 1) {
    throw FormatError("with " + std::to_string(count) + " rkeys for " +
                      std::to_string(range.nbytes) + " bytes in chunks of " +
                      std::to_string(region.chunk_bytes));
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    region.keys.push_back(reader.get<std::uint32_t>("rkey"));
  }
  return region;
}

}  // namespace rkv::verbs
