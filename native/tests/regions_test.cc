// SPDX-License-Identifier: Apache-2.0
#include "core/regions.h"

#include <gtest/gtest.h>

#include <stdexcept>

#include "core/rows.h"

namespace rkv {
namespace {

constexpr std::uint64_t kTop = UINT64_MAX;

TEST(MemoryRange, ContainsCannotOverflow) {
  const MemoryRange range{0x1000, 0x1000};
  EXPECT_TRUE(range.contains(0x1000, 0x1000));
  EXPECT_TRUE(range.contains(0x2000, 0));
  EXPECT_FALSE(range.contains(0x1000, 0x1001));
  EXPECT_FALSE(range.contains(0xfff, 1));
  EXPECT_FALSE(range.contains(0x1800, kTop));
  EXPECT_FALSE(range.contains(kTop, 2));
}

TEST(RegionIndex, FindsTheRegionThatHoldsTheWholeRange) {
  const RegionIndex index({{7, {0x5000, 0x1000}}, {3, {0x1000, 0x1000}}});
  EXPECT_EQ(index.find(0x1800, 0x800, nullptr)->id, 3U);
  EXPECT_EQ(index.find(0x5000, 1, nullptr)->id, 7U);
  EXPECT_EQ(index.find(0x1800, 0x801, nullptr), nullptr);
  EXPECT_EQ(index.find(0x4fff, 1, nullptr), nullptr);
  EXPECT_EQ(index.without(3).find(0x1800, 1, nullptr), nullptr);
}

TEST(RegionIndex, FindsTheEnclosingOneOfOverlappingRegions) {
  const RegionIndex index({{1, {0x1000, 0x9000}}, {2, {0x2000, 0x100}}});
  EXPECT_EQ(index.find(0x2080, 0x1000, nullptr)->id, 1U);
}

TEST(SliceRows, NamesTheFirstBadRow) {
  const RegionIndex local = RegionIndex().with({0, {0x1000, 0x1000}});
  const RegionIndex remote = RegionIndex().with({0, {0x8000, 0x1000}});
  const auto reason = [&](std::int64_t src, std::int64_t dst, std::int64_t nbytes) -> std::string {
    const std::vector<std::int64_t> sources{0x1000, src};
    const std::vector<std::int64_t> targets{0x8000, dst};
    const std::vector<std::int64_t> lengths{16, nbytes};
    try {
      std::vector<WriteSlice> slices;
      slice_rows({sources, targets, lengths}, local, remote, 4096, slices);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(reason(0x1100, 0x8100, 16), "");
  EXPECT_EQ(reason(-1, -1, 0), "");
  EXPECT_NE(reason(0x1ff1, 0x8100, 16).find("row 1: local range [0x1ff1, +16)"), std::string::npos);
  EXPECT_NE(reason(0x1100, 0x7fff, 16).find("row 1: remote range"), std::string::npos);
  EXPECT_NE(reason(0x1100, 0x8100, -1).find("row 1: nbytes is -1"), std::string::npos);
  EXPECT_NE(reason(-16, 0x8100, 32).find("row 1: local"), std::string::npos);
}

}  // namespace
}  // namespace rkv
