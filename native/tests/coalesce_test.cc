// SPDX-License-Identifier: Apache-2.0
#include "core/coalesce.h"

#include <gtest/gtest.h>

#include <vector>

namespace rkv {
namespace {

using Slices = std::vector<WriteSlice>;

Slices coalesced(const Slices& rows, std::uint64_t block_size) {
  Slices slices;
  Coalescer coalescer(block_size, slices);
  for (const WriteSlice& row : rows) coalescer.add(row);
  coalescer.finish();
  return slices;
}

TEST(Coalesce, JoinsRowsAdjacentOnBothSides) {
  const Slices rows{
      {0x1000, 0x8000, 64, 0, 0}, {0x1040, 0x8040, 64, 0, 0}, {0x1080, 0x8080, 8, 0, 0}};
  EXPECT_EQ(coalesced(rows, 4096), (Slices{{0x1000, 0x8000, 136, 0, 0}}));
}

TEST(Coalesce, KeepsRowsAdjacentOnOneSideOnly) {
  const Slices rows{
      {0x1000, 0x8000, 64, 0, 0}, {0x1040, 0x9000, 64, 0, 0}, {0x5000, 0x9040, 64, 0, 0}};
  EXPECT_EQ(coalesced(rows, 4096), rows);
}

TEST(Coalesce, NeverJoinsAcrossRegions) {
  const Slices local{{0x1000, 0x8000, 64, 0, 0}, {0x1040, 0x8040, 64, 1, 0}};
  const Slices remote{{0x1000, 0x8000, 64, 0, 0}, {0x1040, 0x8040, 64, 0, 1}};
  EXPECT_EQ(coalesced(local, 4096), local);
  EXPECT_EQ(coalesced(remote, 4096), remote);
}

TEST(Coalesce, DropsEmptyRowsAndJoinsAroundThem) {
  const Slices rows{
      {0, 0, 0, 0, 0}, {0x1000, 0x8000, 64, 0, 0}, {7, 7, 0, 3, 3}, {0x1040, 0x8040, 64, 0, 0}};
  EXPECT_EQ(coalesced(rows, 4096), (Slices{{0x1000, 0x8000, 128, 0, 0}}));
  EXPECT_TRUE(coalesced({}, 4096).empty());
}

TEST(Coalesce, SlicesRunsToBlockSize) {
  const Slices rows{{0x1000, 0x8000, 100, 0, 0}, {0x1064, 0x8064, 100, 0, 0}};
  const Slices expected{
      {0x1000, 0x8000, 80, 0, 0}, {0x1050, 0x8050, 80, 0, 0}, {0x10a0, 0x80a0, 40, 0, 0}};
  EXPECT_EQ(coalesced(rows, 80), expected);
}

}  // namespace
}  // namespace rkv
