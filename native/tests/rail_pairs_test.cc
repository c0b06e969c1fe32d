// SPDX-License-Identifier: Apache-2.0
#include "verbs/rail_pairs.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <stdexcept>
#include <string>

namespace rkv::verbs {
namespace {

using Pairs = std::vector<RailPair>;
using Rails = std::vector<RailAddress>;

RailAddress infiniband(std::uint8_t prefix, std::uint8_t id) {
  RailAddress rail{.link_layer = LinkLayer::kInfiniBand, .lid = id, .subnet_bits = 64};
  rail.gid = {0xfe, 0x80, 0, 0, 0, 0, 0, prefix, 0, 0, 0, 0, 0, 0, 0, id};
  return rail;
}

RailAddress roce(std::uint8_t subnet, std::uint8_t id, int subnet_bits = 96 + 24) {
  RailAddress rail{.link_layer = LinkLayer::kEthernet,
                   .gid_type = Gid::Type::kRoceV2,
                   .subnet_bits = subnet_bits};
  rail.gid = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, subnet, id};
  return rail;
}

Pairs swapped(Pairs pairs) {
  for (RailPair& pair : pairs) std::swap(pair.own, pair.other);
  return pairs;
}

std::string refusal(const Rails& own, const Rails& other) {
  try {
    (void)pair_rails(own, other);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST(PairRails, SameSubnetWhateverTheOrder) {
  const Rails own{roce(1, 1), roce(2, 1)};
  const Rails other{roce(2, 9), roce(1, 9)};
  EXPECT_EQ(pair_rails(own, other), (Pairs{{0, 1}, {1, 0}}));
}

TEST(PairRails, ByPositionInOneSubnet) {
  const Rails own{roce(1, 1), roce(1, 2)};
  const Rails other{roce(1, 8), roce(1, 9)};
  EXPECT_EQ(pair_rails(own, other), (Pairs{{0, 0}, {1, 1}}));
}

TEST(PairRails, ShorterListIsUsedAgain) {
  const Rails own{infiniband(0, 1), infiniband(0, 2), infiniband(0, 3)};
  const Rails other{infiniband(0, 8), infiniband(0, 9)};
  EXPECT_EQ(pair_rails(own, other), (Pairs{{0, 0}, {1, 1}, {2, 0}}));
}

TEST(PairRails, RailWithoutCounterpartInItsSubnetStaysIdle) {
  EXPECT_EQ(pair_rails(Rails{roce(1, 1), roce(2, 1)}, Rails{roce(2, 9)}), (Pairs{{1, 0}}));
}

TEST(PairRails, ByPositionWhereNoSubnetIsShared) {
  const Rails own{roce(1, 1), roce(2, 1)};
  EXPECT_EQ(pair_rails(own, Rails{roce(3, 9), roce(4, 9)}), (Pairs{{0, 0}, {1, 1}}));
  EXPECT_EQ(pair_rails(own, Rails{roce(1, 9, 0), roce(2, 9, 0)}), (Pairs{{0, 0}, {1, 1}}));
}

TEST(PairRails, SubnetEndsWithinAByte) {
  // 10.0.0.129/25 and 10.0.0.1/25 against 10.0.0.2/25 and 10.0.0.130/25.
  const Rails own{roce(0, 129, 96 + 25), roce(0, 1, 96 + 25)};
  const Rails other{roce(0, 2, 96 + 25), roce(0, 130, 96 + 25)};
  const Pairs pairs = pair_rails(own, other);
  EXPECT_EQ(pairs.size(), 2U);
  for (const RailPair& pair : pairs) EXPECT_NE(pair.own, pair.other);
}

TEST(PairRails, MixedFabricsKeepToTheirOwn) {
  const Rails own{roce(1, 1, 0), infiniband(0, 1)};
  const Rails other{infiniband(0, 2), roce(2, 2, 0)};
  EXPECT_EQ(pair_rails(own, other), (Pairs{{1, 0}}));
}

TEST(PairRails, RefusesFabricsThatCannotTalk) {
  const std::string text = refusal({infiniband(0, 1)}, {roce(1, 1)});
  EXPECT_NE(text.find("ours are InfiniBand, the peer's are RoCE v2 over IPv4"), std::string::npos)
      << text;
  RailAddress v1 = roce(1, 1);
  v1.gid_type = Gid::Type::kRoceV1;
  EXPECT_NE(refusal({v1}, {roce(1, 2)}), "");
  RailAddress v6 = roce(1, 1);
  v6.gid[0] = 0x20;
  EXPECT_NE(refusal({v6}, {roce(1, 2)}), "");
  EXPECT_NE(refusal({}, {roce(1, 2)}).find("ours are missing"), std::string::npos);
}

class RandomRails {
 public:
  explicit RandomRails(unsigned seed) : random_(seed) {}

  Rails next() {
    Rails rails(1 + random_() % 5);
    for (RailAddress& rail : rails) {
      const auto subnet = static_cast<std::uint8_t>(random_() % 3);
      const auto id = static_cast<std::uint8_t>(random_());
      const int bits = random_() % 4 == 0 ? 0 : 96 + 24;
      rail = random_() % 4 == 0 ? infiniband(subnet, id) : roce(subnet, id, bits);
    }
    return rails;
  }

 private:
  std::mt19937 random_;
};

bool can_talk(const RailAddress& a, const RailAddress& b) { return a.link_layer == b.link_layer; }

/// How often each rail is used, of those used.
std::map<std::size_t, int> uses(const Pairs& pairs, std::size_t RailPair::* side) {
  std::map<std::size_t, int> counts;
  for (const RailPair& pair : pairs) ++counts[pair.*side];
  return counts;
}

TEST(PairRails, BothEndsAgree) {
  RandomRails random(1);
  int paired = 0;
  for (int round = 0; round < 5000; ++round) {
    const Rails own = random.next();
    const Rails other = random.next();
    if (!refusal(own, other).empty()) {
      EXPECT_NE(refusal(other, own), "");
      for (const RailAddress& a : own) {
        for (const RailAddress& b : other) EXPECT_FALSE(can_talk(a, b));
      }
      continue;
    }
    ++paired;
    const Pairs pairs = pair_rails(own, other);
    ASSERT_FALSE(pairs.empty());
    EXPECT_EQ(pairs, swapped(pair_rails(other, own)));
    for (const RailPair& pair : pairs)
      EXPECT_TRUE(can_talk(own.at(pair.own), other.at(pair.other)));
  }
  EXPECT_GT(paired, 1000);
}

TEST(PairRails, UsesRailsOfOneSubnetEvenly) {
  for (std::uint8_t n = 1; n <= 8; ++n) {
    for (std::uint8_t m = 1; m <= 8; ++m) {
      Rails own;
      Rails other;
      for (std::uint8_t i = 0; i < n; ++i) own.push_back(roce(1, i));
      for (std::uint8_t i = 0; i < m; ++i) other.push_back(roce(1, i));
      const Pairs pairs = pair_rails(own, other);
      EXPECT_EQ(pairs.size(), std::max(n, m));
      for (const auto& [side, size] : {std::pair(&RailPair::own, n), {&RailPair::other, m}}) {
        const auto counts = uses(pairs, side);
        EXPECT_EQ(counts.size(), size);
        for (const auto& [rail, count] : counts) {
          EXPECT_GE(count, static_cast<int>(pairs.size()) / size) << rail;
          EXPECT_LE(count, static_cast<int>(pairs.size()) / size + 1) << rail;
        }
      }
    }
  }
}

}  // namespace
}  // namespace rkv::verbs
