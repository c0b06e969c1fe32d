// SPDX-License-Identifier: Apache-2.0
#include "core/checksum.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>

namespace rkv {
namespace {

// Values of the reference implementation (xxhsum -H1).
TEST(Checksum, MatchesPublishedXxh64) {
  const std::string_view abc = "abc";
  const std::string_view sentence = "Nobody inspects the spammish repetition";
  EXPECT_EQ(checksum64(nullptr, 0), 0xEF46DB3751D8E999U);
  EXPECT_EQ(checksum64("a", 1), 0xD24EC4F1A98C6E5BU);
  EXPECT_EQ(checksum64(abc.data(), abc.size()), 0x44BC2CF5AD770999U);
  EXPECT_EQ(checksum64(sentence.data(), sentence.size()), 0xFBCEA83C8A378BF1U);
}

TEST(Checksum, SeesEveryByte) {
  std::string page(4096 + 13, 'x');
  const std::uint64_t before = checksum64(page.data(), page.size());
  for (std::size_t i = 0; i < page.size(); ++i) {
    page[i] ^= 1;
    EXPECT_NE(checksum64(page.data(), page.size()), before) << "byte " << i;
    page[i] ^= 1;
  }
}

}  // namespace
}  // namespace rkv
