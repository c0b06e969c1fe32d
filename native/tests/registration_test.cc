// SPDX-License-Identifier: Apache-2.0
#include "verbs/registration.h"

#include <gtest/gtest.h>

#include <cerrno>

#include "backend_node.h"

namespace rkv::verbs {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;
constexpr MemoryUse kHost{};

/// The rails of one host. Nothing of the memory is touched: a fake registration pins nothing.
struct Rails {
  explicit Rails(const FakeOptions& options = fake_fabric(1),
                 const Ibverbs& lib = FakeFabric::table())
      : fabric(options) {
    for (const FakeDeviceOptions& device : options.devices) {
      rails.push_back(std::make_shared<Rail>(lib, device.name, std::uint8_t{1}));
    }
    objects = fabric.live_objects();
  }

  std::string error(const MemoryRange& range, std::uint64_t min_chunk_bytes = kMiB) {
    try {
      const Registration registration(rails, range, kHost, min_chunk_bytes, pinned);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }

  CleanFabric fabric;
  std::vector<std::shared_ptr<Rail>> rails;
  PinnedBytes pinned = 0;
  std::size_t objects;
};

TEST(Registration, OneMrOnEveryRail) {
  Rails host(fake_fabric(2));
  {
    const Registration registration(host.rails, {0x7000, 5 * kMiB}, kHost, kMiB, host.pinned);
    EXPECT_EQ(host.fabric.live_objects(), host.objects + 2);
    EXPECT_EQ(host.pinned, 10 * kMiB);
    for (std::size_t rail : {0U, 1U}) {
      const RegionKeys local = registration.local_keys(rail);
      const RegionKeys remote = registration.remote_keys(rail);
      EXPECT_EQ(local.base, 0x7000U);
      EXPECT_EQ(local.chunk_bytes, 5 * kMiB);
      ASSERT_EQ(local.keys.size(), 1U);
      ASSERT_EQ(remote.keys.size(), 1U);
      EXPECT_NE(local.keys[0], remote.keys[0]);
    }
  }
  EXPECT_EQ(host.fabric.live_objects(), host.objects);
  EXPECT_EQ(host.pinned, 0U);
}

TEST(Registration, ChunksOfWhatEveryDeviceTakes) {
  FakeOptions options = fake_fabric(2);
  options.devices[1].max_mr_size = 3 * kMiB;
  Rails host(options);
  const Registration registration(host.rails, {0x7000, 5 * kMiB}, kHost, kMiB, host.pinned);
  // Three chunks on each rail: edges stay multiples of a huge page.
  EXPECT_EQ(host.fabric.live_objects(), host.objects + 6);
  const RegionKeys keys = registration.remote_keys(0);
  EXPECT_EQ(keys.chunk_bytes, 2 * kMiB);
  ASSERT_EQ(keys.keys.size(), 3U);
  EXPECT_EQ(keys.key(0x7000), keys.keys[0]);
  EXPECT_EQ(keys.key(0x7000 + 2 * kMiB - 1), keys.keys[0]);
  EXPECT_EQ(keys.key(0x7000 + 2 * kMiB), keys.keys[1]);
  EXPECT_EQ(keys.key(0x7000 + 5 * kMiB - 1), keys.keys[2]);
  EXPECT_EQ(keys.same_key_bytes(0x7000 + kMiB), kMiB);
}

TEST(Registration, TransfersCrossChunkEdges) {
  constexpr std::uint64_t kBlock = 64 << 10;
  const FakeDeviceOptions device{.max_mr_size = 96 << 10};
  NodePair pair({.block_size = kBlock}, {}, device);
  for (std::size_t i = 0; i < pair.a.buffer.size(); ++i) {
    pair.a.buffer[i] = static_cast<unsigned char>(i * 7 / 5);
  }
  std::vector<WriteSlice> slices;
  const std::size_t n = pair.a.buffer.size() - kBlock;
  for (std::size_t at = 0; at < n; at += kBlock) {
    slices.push_back(pair.a.slice(at, pair.b, at + 1000, kBlock));
  }
  pair.write(1, slices);
  ASSERT_TRUE(pair.turn_until([&] { return pair.a.seen[1].landed[1] == slices.size(); }));
  EXPECT_EQ(std::memcmp(pair.a.buffer.data(), pair.b.buffer.data() + 1000, n), 0);
}

TEST(Registration, ChunksMustHoldABlock) {
  Rails host(fake_fabric(1, {}, {.max_mr_size = 256 << 10}));
  EXPECT_TRUE(has_words(host.error({0, 5 * kMiB}), {"at most 262144 bytes", "set block_size to"}));
  EXPECT_EQ(host.error({0, 5 * kMiB}, 256 << 10), "");
  EXPECT_EQ(host.error({0, 4096}), "");  // A region may be smaller than a block.
}

TEST(Registration, MemlockLimit) {
  EXPECT_NO_THROW(check_memlock(UINT64_MAX, 0, UINT64_MAX));
  EXPECT_NO_THROW(check_memlock(4096, 4096, 8192));
  EXPECT_THROW(check_memlock(4097, 4096, 8192), std::runtime_error);
  EXPECT_THROW(check_memlock(8193, 0, 8192), std::runtime_error);
  EXPECT_THROW(check_memlock(4096, UINT64_MAX - 4095, 8192), std::runtime_error);  // No sum wraps.

  Ibverbs lib = FakeFabric::table();
  lib.memlock_limit = [] { return std::uint64_t{8 * kMiB}; };
  Rails host(fake_fabric(2), lib);
  const Registration pinned(host.rails, {0, kMiB}, kHost, kMiB, host.pinned);
  const std::string error = host.error({0, 4 * kMiB});
  // Both rails pin it, each by its own account.
  EXPECT_TRUE(has_words(
      error, {"8388608 bytes to pin", "ulimit -l", "is 8388608 bytes", "has pinned 2097152"}));
  EXPECT_TRUE(has_words(error, {"* - memlock unlimited", "/etc/security/limits.conf"}));
  EXPECT_TRUE(has_words(error, {"LimitMEMLOCK=infinity", "slurmd",
                                "PropagateResourceLimitsExcept=MEMLOCK", "slurm.conf"}));
  EXPECT_EQ(host.error({0, 3 * kMiB}), "");
}

TEST(Registration, WhatTheKernelRefuses) {
  Rails host(fake_fabric(2));
  host.fabric.fail_next_reg_mr("rxe0", EFAULT);
  EXPECT_TRUE(has_words(host.error({0xabc000, kMiB}),
                        {"ibv_reg_mr(rxe0:1, 0xabc000, 1048576 bytes)", "EFAULT", "not mapped"}));
  host.fabric.fail_next_reg_mr("rxe1", ENOMEM);
  EXPECT_TRUE(has_words(host.error({0xabc000, kMiB}),
                        {"ibv_reg_mr(rxe1:1", "ENOMEM", "limits.conf", "slurmd"}));
  host.fabric.fail_next_reg_mr("rxe1", EPERM);
  EXPECT_TRUE(has_words(host.error({0xabc000, kMiB}), {"EPERM", "kernel log"}));
  // What rail 0 had registered by then is gone again.
  EXPECT_EQ(host.fabric.live_objects(), host.objects);
  EXPECT_EQ(host.pinned, 0U);
  EXPECT_EQ(host.error({0xabc000, kMiB}), "");
}

unsigned last_access = 0;

ibv_mr* note_iova2(ibv_pd* pd, void* address, std::size_t length, std::uint64_t iova,
                   unsigned access) {
  last_access = access;
  return FakeFabric::table().reg_mr_iova2(pd, address, length, iova, access);
}

ibv_mr* note_reg_mr(ibv_pd* pd, void* address, std::size_t length, int access) {
  last_access = static_cast<unsigned>(access);
  return (FakeFabric::table().reg_mr)(pd, address, length, access);
}

TEST(Registration, AccessIsNoMoreThanNeeded) {
  Ibverbs lib = FakeFabric::table();
  lib.reg_mr_iova2 = note_iova2;
  Rails host(fake_fabric(1), lib);
  const auto access = [&](const MemoryUse& use) {
    const Registration registration(host.rails, {0, kMiB}, use, kMiB, host.pinned);
    return last_access;
  };
  constexpr unsigned kRelaxed = IBV_ACCESS_RELAXED_ORDERING;
  EXPECT_EQ(access({.peer_writable = false}), kRelaxed);
  EXPECT_EQ(access({.peer_writable = true}),
            kRelaxed | IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
}

/// libibverbs drops the optional flag where the kernel or the driver does not take it; one that is
/// too old to know it (rdma-core < 26) is not given it.
TEST(Registration, OldLibrariesAreNotAskedForRelaxedOrdering) {
  FakeOptions options = fake_fabric(1);
  options.refuse_relaxed_ordering = true;
  Ibverbs lib = FakeFabric::table();
  lib.reg_mr_iova2 = nullptr;
  lib.reg_mr = note_reg_mr;
  Rails host(options, lib);
  EXPECT_EQ(host.error({0, kMiB}), "");
  EXPECT_EQ(last_access, unsigned{IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE});
}

TEST(Registration, RefusedRelaxedOrderingIsReported) {
  FakeOptions options = fake_fabric(1);
  options.refuse_relaxed_ordering = true;
  Rails host(options);
  EXPECT_TRUE(has_words(host.error({0, kMiB}), {"ibv_reg_mr(rxe0:1", "EINVAL"}));
}

}  // namespace
}  // namespace rkv::verbs
