// SPDX-License-Identifier: Apache-2.0
#include "verbs/chain_builder.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

namespace rkv::verbs {
namespace {

constexpr std::uint64_t kLocal = 0x10000;
constexpr std::uint64_t kRemote = 0x90000;
constexpr ChainLimits kLimits{
    .wrs = kMaxChainWrs, .nbytes = 1 << 20, .wr_bytes = 4096, .sges = 4, .inline_bytes = 0};

/// Region 0 of one chunk on both sides, and a second region behind it.
const KeysByRegion kLocalKeys{
    {0, {.base = kLocal, .chunk_bytes = 1 << 20, .keys = {10}}},
    {1, {.base = kLocal + (1 << 20), .chunk_bytes = 1 << 20, .keys = {11}}}};
const KeysByRegion kRemoteKeys{
    {0, {.base = kRemote, .chunk_bytes = 1 << 20, .keys = {20}}},
    {1, {.base = kRemote + (1 << 20), .chunk_bytes = 1 << 20, .keys = {21}}}};

WriteSlice slice(std::uint64_t local, std::uint64_t remote, std::uint64_t nbytes) {
  return {.local_address = kLocal + local, .remote_address = kRemote + remote, .nbytes = nbytes};
}

std::vector<const ibv_send_wr*> chain(ChainBuilder& builder) {
  std::vector<const ibv_send_wr*> wrs;
  for (const ibv_send_wr* wr = builder.finish(7, {}); wr != nullptr; wr = wr->next) {
    wrs.push_back(wr);
  }
  return wrs;
}

TEST(ChainBuilder, GathersSlicesOfContiguousTargets) {
  ChainBuilder builder;
  const std::vector<WriteSlice> slices{slice(8192, 0, 512), slice(0, 512, 256),
                                       slice(4096, 768, 128)};
  EXPECT_EQ(builder.build(slices, kLocalKeys, kRemoteKeys, kLimits), 3U);
  const auto wrs = chain(builder);
  ASSERT_EQ(wrs.size(), 1U);
  EXPECT_EQ(wrs[0]->opcode, IBV_WR_RDMA_WRITE);
  EXPECT_EQ(wrs[0]->wr.rdma.remote_addr, kRemote);
  EXPECT_EQ(wrs[0]->wr.rdma.rkey, 20U);
  ASSERT_EQ(wrs[0]->num_sge, 3);
  EXPECT_EQ(wrs[0]->sg_list[1].addr, kLocal);
  EXPECT_EQ(wrs[0]->sg_list[1].length, 256U);
  EXPECT_EQ(wrs[0]->sg_list[1].lkey, 10U);
  EXPECT_EQ(builder.nbytes(), 896U);
  EXPECT_EQ(builder.sges(), 3U);
}

TEST(ChainBuilder, DoesNotGatherWhatIsNotContiguousOrNotOfOneKey) {
  ChainBuilder builder;
  WriteSlice other_region = slice(0, 1 << 20, 64);
  other_region.remote_region = 1;
  for (const auto& slices :
       std::vector<std::vector<WriteSlice>>{{slice(0, 0, 64), slice(64, 65, 64)},  // a gap
                                            {slice(0, 64, 64), slice(64, 0, 64)},  // backwards
                                            {slice(0, 0, 64), slice(64, 32, 64)},  // overlapping
                                            {slice(0, (1 << 20) - 64, 64), other_region}}) {
    EXPECT_EQ(builder.build(slices, kLocalKeys, kRemoteKeys, kLimits), 2U);
    const auto wrs = chain(builder);
    ASSERT_EQ(wrs.size(), 2U);
    EXPECT_EQ(wrs[1]->wr.rdma.rkey, slices[1].remote_region == 1 ? 21U : 20U);
  }
}

TEST(ChainBuilder, GathersFromSeveralRegions) {
  ChainBuilder builder;
  WriteSlice other_region = slice(1 << 20, 64, 64);
  other_region.local_region = 1;
  const std::vector slices{slice(0, 0, 64), other_region};
  builder.build(slices, kLocalKeys, kRemoteKeys, kLimits);
  const auto wrs = chain(builder);
  ASSERT_EQ(wrs.size(), 1U);
  EXPECT_EQ(wrs[0]->sg_list[0].lkey, 10U);
  EXPECT_EQ(wrs[0]->sg_list[1].lkey, 11U);
}

TEST(ChainBuilder, LimitsOfAWr) {
  std::vector<WriteSlice> slices;
  for (std::uint64_t i = 0; i < 12; ++i) slices.push_back(slice(i * 2048, i * 1024, 1024));
  ChainBuilder builder;
  const auto sges_of = [&](const ChainLimits& limits) {
    EXPECT_EQ(builder.build(slices, kLocalKeys, kRemoteKeys, limits), 12U);
    std::vector<int> sges;
    for (const ibv_send_wr* wr : chain(builder)) sges.push_back(wr->num_sge);
    return sges;
  };
  ChainLimits limits = kLimits;
  limits.wr_bytes = 1 << 20;
  limits.sges = 5;
  EXPECT_EQ(sges_of(limits), (std::vector{5, 5, 2}));
  limits.wr_bytes = 3 * 1024 + 1023;
  EXPECT_EQ(sges_of(limits), (std::vector{3, 3, 3, 3}));
  limits.wr_bytes = 1;  // Bounds what is gathered, never a slice.
  EXPECT_EQ(sges_of(limits), std::vector<int>(12, 1));
}

TEST(ChainBuilder, LimitsOfAChain) {
  std::vector<WriteSlice> slices;
  for (std::uint64_t i = 0; i < 200; ++i) slices.push_back(slice(i * 64, (200 - i) * 64, 64));
  ChainBuilder builder;
  // Each leaves room for a slice that is cut twice.
  EXPECT_EQ(builder.build(slices, kLocalKeys, kRemoteKeys, kLimits), kMaxChainWrs - 2);
  ChainLimits limits = kLimits;
  limits.wrs = kMaxWrsPerSlice;
  EXPECT_EQ(builder.build(slices, kLocalKeys, kRemoteKeys, limits), 1U);
  limits = kLimits;
  limits.nbytes = 129;
  EXPECT_EQ(builder.build(slices, kLocalKeys, kRemoteKeys, limits), 3U);
  EXPECT_EQ(builder.nbytes(), 192U);
}

TEST(ChainBuilder, CutsAtChunkEdgesOfBothSides) {
  const KeysByRegion local{{0, {.base = kLocal, .chunk_bytes = 4096, .keys = {10, 11}}}};
  const KeysByRegion remote{{0, {.base = kRemote, .chunk_bytes = 4096, .keys = {20, 21}}}};
  ChainBuilder builder;
  const std::vector slices{slice(1096, 96, 4096)};  // Edges after 3000 and after 4000 bytes.
  EXPECT_EQ(builder.build(slices, local, remote, kLimits), 1U);
  const auto wrs = chain(builder);
  // The edge here is one SGE's end only: the targets go on.
  ASSERT_EQ(wrs.size(), 2U);
  ASSERT_EQ(wrs[0]->num_sge, 2);
  EXPECT_EQ(wrs[0]->sg_list[0].length, 3000U);
  EXPECT_EQ(wrs[0]->sg_list[1].length, 1000U);
  EXPECT_EQ(wrs[0]->sg_list[1].lkey, 11U);
  EXPECT_EQ(wrs[1]->wr.rdma.rkey, 21U);
  EXPECT_EQ(wrs[1]->wr.rdma.remote_addr, kRemote + 4096);
  EXPECT_EQ(wrs[1]->sg_list[0].length, 96U);
}

TEST(ChainBuilder, InlinesOnlyWhatTheCpuCanRead) {
  KeysByRegion local = kLocalKeys;
  local.at(1).cpu_readable = false;
  ChainLimits limits = kLimits;
  limits.inline_bytes = 220;
  const auto inlined = [&](const std::vector<WriteSlice>& slices) {
    ChainBuilder builder;
    builder.build(slices, local, kRemoteKeys, limits);
    const auto wrs = chain(builder);
    EXPECT_EQ(wrs.size(), 1U);
    return (wrs.front()->send_flags & IBV_SEND_INLINE) != 0;
  };
  const WriteSlice host = slice(0, 0, 64);
  WriteSlice gpu = slice(1 << 20, 0, 64);
  gpu.local_region = 1;
  const auto behind = [](WriteSlice next) {
    next.remote_address += 64;
    return next;
  };
  EXPECT_TRUE(inlined({host, behind(host)}));
  EXPECT_FALSE(inlined({gpu}));
  EXPECT_FALSE(inlined({gpu, behind(host)}));
  EXPECT_FALSE(inlined({host, behind(gpu)}));
}

TEST(ChainBuilder, OnlyTheLastWrIsSignalledAndCarriesTheImm) {
  ChainBuilder builder;
  const std::vector slices{slice(0, 4096, 64), slice(64, 0, 64), slice(128, 2048, 64)};
  builder.build(slices, kLocalKeys, kRemoteKeys, kLimits);
  const ibv_send_wr* wr = builder.finish(0x0123456789abcdef, 0xfedcba98);
  for (int i = 0; i < 3; ++i, wr = wr->next) {
    ASSERT_NE(wr, nullptr);
    EXPECT_EQ(wr->wr_id, 0x0123456789abcdefU);
    EXPECT_EQ(wr->send_flags, i == 2 ? unsigned{IBV_SEND_SIGNALED} : 0U);
    EXPECT_EQ(wr->opcode, i == 2 ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE);
    if (i == 2) {
      EXPECT_EQ(ntohl(wr->imm_data), 0xfedcba98U);
    }
  }
  EXPECT_EQ(wr, nullptr);
  // Nothing of it remains in the next chain.
  builder.build(slices, kLocalKeys, kRemoteKeys, kLimits);
  EXPECT_EQ(chain(builder)[2]->opcode, IBV_WR_RDMA_WRITE);
}

TEST(ChainBuilder, InlineIsWhatFits) {
  ChainBuilder builder;
  ChainLimits limits = kLimits;
  limits.inline_bytes = 128;
  const std::vector slices{slice(0, 0, 100), slice(200, 100, 28), slice(300, 1000, 129),
                           slice(500, 2000, 100), slice(700, 2100, 29)};
  builder.build(slices, kLocalKeys, kRemoteKeys, limits);
  const auto wrs = chain(builder);
  ASSERT_EQ(wrs.size(), 3U);
  EXPECT_EQ(wrs[0]->send_flags, unsigned{IBV_SEND_INLINE});  // 128 bytes from two slices
  EXPECT_EQ(wrs[1]->send_flags, 0U);
  EXPECT_EQ(wrs[2]->send_flags, unsigned{IBV_SEND_SIGNALED});  // Not any more, with its second.
}

/// Memory of one side: two regions in chunks with keys of their own.
struct Memory {
  std::vector<unsigned char> bytes = std::vector<unsigned char>(2 * kRegionBytes);
  KeysByRegion keys;

  static constexpr std::uint64_t kRegionBytes = 64 << 10;

  Memory(std::uint64_t chunk_bytes, std::uint32_t first_key) {
    for (RegionId region = 0; region < 2; ++region) {
      RegionKeys& of_region = keys[region];
      of_region = {.base = address(region), .chunk_bytes = chunk_bytes};
      for (std::uint64_t at = 0; at < kRegionBytes; at += chunk_bytes) {
        of_region.keys.push_back(first_key++);
      }
    }
  }
  [[nodiscard]] std::uint64_t address(RegionId region) const {
    return reinterpret_cast<std::uint64_t>(bytes.data()) + region * kRegionBytes;
  }
  /// Where the range is, if one chunk with this key has all of it.
  [[nodiscard]] unsigned char* at(std::uint64_t address, std::uint64_t nbytes,
                                  std::uint32_t key) const {
    for (const auto& [id, region] : keys) {
      for (std::uint64_t i = 0; i < region.keys.size(); ++i) {
        const std::uint64_t begin = region.base + i * region.chunk_bytes;
        const std::uint64_t end = std::min(begin + region.chunk_bytes, region.base + kRegionBytes);
        if (region.keys[i] == key && address >= begin && address + nbytes <= end) {
          return reinterpret_cast<unsigned char*>(address);
        }
      }
    }
    return nullptr;
  }
};

/// Slices of up to `block` bytes, often contiguous at their targets.
std::vector<WriteSlice> random_slices(const Memory& from, const Memory& to, std::uint64_t block,
                                      std::mt19937_64& random) {
  std::vector<WriteSlice> slices;
  std::uint64_t next = 0;
  for (int i = 0; i < 100; ++i) {
    const std::uint64_t nbytes = random() % block + 1;
    const std::uint64_t room = Memory::kRegionBytes - nbytes + 1;
    const auto local = static_cast<RegionId>(random() % 2);
    WriteSlice slice{.local_address = from.address(local) + random() % room,
                     .nbytes = nbytes,
                     .local_region = local,
                     .remote_region = static_cast<RegionId>(random() % 2)};
    slice.remote_address = to.address(slice.remote_region) + random() % room;
    if (i > 0 && random() % 3 != 0 && next + nbytes <= Memory::kRegionBytes) {
      slice.remote_region = slices.back().remote_region;
      slice.remote_address = to.address(slice.remote_region) + next;
    }
    next = slice.remote_address - to.address(slice.remote_region) + nbytes;
    slices.push_back(slice);
  }
  return slices;
}

/// Does what the NIC would, into `to`, with its checks.
void execute(const ibv_send_wr* wr, const Memory& from, const Memory& to,
             const ChainLimits& limits) {
  for (; wr != nullptr; wr = wr->next) {
    ASSERT_LE(static_cast<std::uint32_t>(wr->num_sge), limits.sges);
    std::uint64_t nbytes = 0;
    for (int i = 0; i < wr->num_sge; ++i) nbytes += wr->sg_list[i].length;
    if (wr->num_sge > 1) {
      ASSERT_LE(nbytes, limits.wr_bytes);
    }
    ASSERT_EQ((wr->send_flags & IBV_SEND_INLINE) != 0, nbytes <= limits.inline_bytes);
    ASSERT_EQ((wr->send_flags & IBV_SEND_SIGNALED) != 0, wr->next == nullptr);
    unsigned char* target = to.at(wr->wr.rdma.remote_addr, nbytes, wr->wr.rdma.rkey);
    ASSERT_NE(target, nullptr);
    for (int i = 0; i < wr->num_sge; ++i) {
      const ibv_sge& sge = wr->sg_list[i];
      const unsigned char* source = from.at(sge.addr, sge.length, sge.lkey);
      ASSERT_NE(source, nullptr);
      std::memcpy(target, source, sge.length);
      target += sge.length;
    }
  }
}

TEST(ChainBuilder, ChainsDoWhatTheSlicesSay) {
  std::mt19937_64 random(11);
  ChainBuilder builder;
  for (int round = 0; round < 100; ++round) {
    const std::uint64_t block = 64U << (random() % 5);
    // Of one key, or of several with a last one that is shorter.
    const auto chunk = [&] { return random() % 2 == 0 ? 1 << 20 : block + random() % 700; };
    Memory from(chunk(), 100);
    Memory to(chunk(), 5000);
    std::generate(from.bytes.begin(), from.bytes.end(), [value = random()]() mutable {
      return static_cast<unsigned char>((value += 0x9e3779b97f4a7c15) >> 56);
    });
    std::vector<unsigned char> expected = to.bytes;
    const std::vector<WriteSlice> slices = random_slices(from, to, block, random);
    for (const WriteSlice& slice : slices) {
      std::memcpy(&expected[slice.remote_address - to.address(0)],
                  reinterpret_cast<const void*>(slice.local_address), slice.nbytes);
    }
    const ChainLimits limits{.wrs = static_cast<std::uint32_t>(random() % 61) + 3,
                             .nbytes = random() % (32 << 10) + 1,
                             .wr_bytes = block,
                             .sges = static_cast<std::uint32_t>(random() % kMaxSge) + 1,
                             .inline_bytes = static_cast<std::uint32_t>(random() % 300)};
    for (std::span<const WriteSlice> rest = slices; !rest.empty();) {
      const std::size_t taken = builder.build(rest, from.keys, to.keys, limits);
      ASSERT_GE(taken, 1U);
      ASSERT_LE(builder.wrs(), limits.wrs);
      std::uint64_t nbytes = 0;
      for (const WriteSlice& slice : rest.first(taken)) nbytes += slice.nbytes;
      ASSERT_EQ(builder.nbytes(), nbytes);
      ASSERT_LT(nbytes - rest[taken - 1].nbytes, limits.nbytes);
      ASSERT_NO_FATAL_FAILURE(execute(builder.finish(1, {}), from, to, limits));
      rest = rest.subspan(taken);
    }
    ASSERT_EQ(to.bytes, expected) << "round " << round;
  }
}

}  // namespace
}  // namespace rkv::verbs
