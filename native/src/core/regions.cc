// SPDX-License-Identifier: Apache-2.0
#include "core/regions.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "core/text.h"
#include "core/wire.h"

namespace rkv {
namespace {

constexpr std::uint32_t kMagic = 0x4d564b52;  // "RKVM"
constexpr std::uint16_t kVersion = 1;
constexpr std::size_t kDescribedRegions = 4;  ///< An error text needs no more to be understood.

}  // namespace

std::string MemoryRange::text() const {
  std::string text("[");
  text.append(hex_text(address)).append(", +").append(std::to_string(nbytes)).append(")");
  return text;
}

RegionIndex::RegionIndex(std::vector<Region> regions) : regions_(std::move(regions)) {
  std::sort(regions_.begin(), regions_.end(),
            [](const Region& a, const Region& b) { return a.range.address < b.range.address; });
}

const RegionIndex::Region* RegionIndex::find(std::uint64_t address, std::uint64_t nbytes,
                                             const Region* hint) const {
  if (hint != nullptr && hint->range.contains(address, nbytes)) return hint;
  const auto after = std::upper_bound(
      regions_.begin(), regions_.end(), address,
      [](std::uint64_t wanted, const Region& region) { return wanted < region.range.address; });
  // The nearest region below holds the range unless regions overlap; then an earlier one may.
  for (auto it = after; it != regions_.begin();) {
    --it;
    if (it->range.contains(address, nbytes)) return &*it;
  }
  return nullptr;
}

RegionIndex RegionIndex::with(Region region) const {
  std::vector<Region> regions = regions_;
  regions.push_back(region);
  return RegionIndex(std::move(regions));
}

RegionIndex RegionIndex::without(RegionId id) const {
  RegionIndex smaller = *this;
  std::erase_if(smaller.regions_, [id](const Region& region) { return region.id == id; });
  return smaller;
}

std::string RegionIndex::describe() const {
  std::string text = std::to_string(regions_.size()) + " regions";
  for (std::size_t i = 0; i < std::min(regions_.size(), kDescribedRegions); ++i) {
    text += (i == 0 ? ": " : ", ") + regions_[i].range.text();
  }
  if (regions_.size() > kDescribedRegions) text += ", ...";
  return text;
}

Bytes MemoryDescriptor::encode() const {
  ByteWriter writer;
  writer.put(kMagic);
  writer.put(kVersion);
  writer.put_string(backend);
  writer.put(incarnation);
  writer.put(range.address);
  writer.put(range.nbytes);
  writer.put_string(blob);
  return writer.take();
}

MemoryDescriptor MemoryDescriptor::decode(std::string_view bytes) {
  ByteReader reader(bytes);
  MemoryDescriptor descriptor;
  if (reader.get<std::uint32_t>("magic") != kMagic) throw FormatError("not a memory descriptor");
  const auto version = reader.get<std::uint16_t>("version");
  if (version != kVersion) {
    throw FormatError("of version " + std::to_string(version) + "; this engine speaks version " +
                      std::to_string(kVersion));
  }
  descriptor.backend = reader.get_string("backend name");
  descriptor.incarnation = reader.get<std::uint64_t>("incarnation");
  descriptor.range.address = reader.get<std::uint64_t>("address");
  descriptor.range.nbytes = reader.get<std::uint64_t>("length");
  descriptor.blob = reader.get_string("backend part");
  reader.expect_end();
  if (descriptor.range.nbytes > UINT64_MAX - descriptor.range.address) {
    throw FormatError("of memory that wraps round the address space");
  }
  return descriptor;
}

}  // namespace rkv
