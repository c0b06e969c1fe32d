// SPDX-License-Identifier: Apache-2.0
/// Posting, set-up and tear-down of the verbs backend.
#include <gtest/gtest.h>

#include <cerrno>

#include "backend_node.h"

namespace rkv::verbs {
namespace {

const FakeDeviceOptions kTiny{.max_qp_wr = 16, .max_cqe = 64, .max_srq_wr = 128};

TEST(VerbsPosting, OneDoorbellAndOneSignalledWrAChain) {
  NodePair pair;
  const auto slices = pair.a.backward_slices(pair.b, 1024, 1024);
  pair.write(1, slices);
  ASSERT_TRUE(pair.turn_until([&] { return pair.a.seen[1].landed[1] == 1024; }));
  const FakeCounters counters = pair.fabric.counters("rxe0");
  EXPECT_EQ(counters.wrs, 1024U);
  EXPECT_EQ(counters.bytes, 1024U * 1024);
  EXPECT_EQ(counters.signaled, counters.doorbells);
  EXPECT_LE(counters.doorbells, 1024U / 62 + 1);
  EXPECT_EQ(pair.a.count("verbs_wrs"), counters.wrs);
  EXPECT_EQ(pair.a.count("verbs_doorbells"), counters.doorbells);
  EXPECT_EQ(pair.a.count("verbs_cqes"), counters.signaled);
  EXPECT_EQ(pair.a.count("bytes_posted_rxe0:1"), counters.bytes);
}

TEST(VerbsPosting, GathersAndInlines) {
  NodePair pair;
  std::vector<WriteSlice> slices;
  // 64 sources of 4 KiB, backwards, to one run at the peer.
  for (std::size_t i = 0; i < 64; ++i) {
    slices.push_back(pair.a.slice((63 - i) * 8192, pair.b, i * 4096, 4096));
  }
  pair.write(1, slices);
  EXPECT_EQ(pair.fabric.counters().sges[16], 4U);
  EXPECT_EQ(pair.fabric.counters().wrs, 4U);
  EXPECT_EQ(pair.fabric.counters().inlined, 0U);
  const std::vector small{pair.a.slice(0, pair.b, 500000, 220),
                          pair.a.slice(300, pair.b, 600000, 221)};
  pair.write(2, small);
  EXPECT_EQ(pair.fabric.counters().inlined, 1U);
}

TEST(VerbsPosting, SharesABatchBetweenQpsAndRails) {
  NodePair pair({.block_size = 65536}, {}, {}, 2, 2);
  pair.write(1, pair.a.backward_slices(pair.b, 16, 65536));
  EXPECT_EQ(pair.fabric.counters("rxe0").bytes, 512U << 10);
  EXPECT_EQ(pair.fabric.counters("rxe1").bytes, 512U << 10);
}

TEST(VerbsPosting, FullQueuesAreNotFailures) {
  NodePair pair({.qps_per_peer = 1}, {}, kTiny);
  const auto slices = pair.a.backward_slices(pair.b, 512, 1024);
  const Posted posted = pair.a.backend.post_writes(1, 1, slices, 9);
  EXPECT_EQ(posted.slices, 14U);  // of 16 WRs: the next slice might need three
  EXPECT_FALSE(posted.signalled);
  EXPECT_EQ(pair.a.backend.post_writes(1, 1, slices, 9).slices, 0U);
  EXPECT_GT(pair.a.count("verbs_posts_refused"), 0U);
  pair.write(1, std::span(slices).subspan(posted.slices));
  EXPECT_TRUE(pair.turn_until([&] { return pair.a.seen[1].landed[1] == 512; }));
  // Empty WRs need one each.
  while (pair.a.backend.post_signal(1, 1)) {
  }
  EXPECT_EQ(pair.fabric.counters().max_sq_occupancy, 16U);
}

/// Of a failed QP every WR makes a CQE, signalled or not.
TEST(VerbsPosting, CqHoldsTheFlushOfAllQueues) {
  NodePair pair({.qps_per_peer = 16, .peer_timeout_s = 0.1}, {.retry_scale = 0.1}, kTiny);
  pair.fabric.drop_all_from("rxe1");
  const auto slices = pair.a.backward_slices(pair.b, 1024, 1024);
  EXPECT_LE(pair.a.backend.post_writes(1, 1, slices, {}).slices, 64U);
  while (pair.a.backend.post_signal(1, 1)) {
  }
  pair.a.backend.probe(1);
  EXPECT_NE(pair.error_at(pair.a), "");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // for the other QPs to fail
  EXPECT_FALSE(pair.fabric.overflowed());
}

/// A signal on every QP takes a CQE each, all of one CQ.
TEST(VerbsPosting, SignalsOnAllQpsNeedACqeEach) {
  NodePair pair({.qps_per_peer = 16, .peer_timeout_s = 0.1}, {.retry_scale = 0.1}, kTiny);
  pair.fabric.drop_all_from("rxe1");
  std::vector<WriteSlice> slices;
  for (std::size_t i = 0; i < 60; ++i) {
    slices.push_back(pair.a.slice(0, pair.b, i % 2 * (512 << 10), 64 << 10));
  }
  ASSERT_EQ(pair.a.backend.post_writes(1, 1, slices, {}).slices, 60U);
  EXPECT_FALSE(pair.a.backend.post_signal(1, 7));  // four CQEs are left
  const auto more = pair.a.backward_slices(pair.b, 256, 1024);
  EXPECT_LE(pair.a.backend.post_writes(1, 2, more, {}).slices, 4U);
}

/// The peer's receives, too, are no more than its CQ holds.
TEST(VerbsPosting, ReceiveCqHoldsAllSignals) {
  NodePair pair({}, {}, kTiny);
  std::uint32_t posted = 0;
  for (int i = 0; i < 100; ++i) {
    while (posted < 500 && pair.a.backend.post_signal(1, posted)) ++posted;
    pair.a.turn();  // The peer polls nothing.
  }
  EXPECT_FALSE(pair.fabric.overflowed());
  EXPECT_TRUE(pair.turn_until([&] {
    while (posted < 500 && pair.a.backend.post_signal(1, posted)) ++posted;
    return pair.b.seen[1].imms.size() == 500;
  }));
}

TEST(VerbsLife, ReachableOnceEveryQpHasAnswered) {
  NodePair pair({.qps_per_peer = 3}, {.delivery = FakeDelivery::kDeferred});
  pair.a.turn();
  EXPECT_FALSE(pair.a.seen[1].reachable);
  pair.a.backend.probe(1);
  EXPECT_TRUE(pair.turn_until([&] { return pair.a.seen[1].reachable; }));
  EXPECT_EQ(pair.a.count("verbs_probes"), 3U);
  EXPECT_EQ(pair.fabric.counters("rxe0").bytes, 0U);
}

/// Nothing is polled before a peer goes: its CQEs and its slots must come back all the same.
TEST(VerbsLife, ThePathNamesEachRailOnce) {
  NodePair pair({.qps_per_peer = 4}, {}, {}, 2, 2);
  const rkv::Path path = pair.a.backend.path(1);
  EXPECT_EQ(path.backend, "verbs");
  EXPECT_TRUE(path.writes);
  EXPECT_EQ(path.description,
            "verbs: rxe0:1 to ::ffff:192.0.2.3 (RoCE v2), rxe1:1 to ::ffff:192.0.2.4 (RoCE v2)");
}

TEST(VerbsLife, CyclesOnATinyCqLeaveNothingBehind) {
  CleanFabric fabric(fake_fabric(2, {.reuse_qpns = true}, kTiny));
  BackendNode a(fabric, {"rxe0"}, {.qps_per_peer = 4}, 64 << 10);
  BackendNode b(fabric, {"rxe1"}, {.qps_per_peer = 4}, 64 << 10);
  const std::size_t objects = fabric.live_objects();
  const auto slices = a.backward_slices(b, 64, 512);
  PeerId id = 0;
  const auto cycle = [&] {
    connect_nodes(a, b, ++id);
    const Posted posted = a.backend.post_writes(id, id, slices, {});
    while (a.backend.post_signal(id, static_cast<std::uint32_t>(id))) {
    }
    if (id % 3 == 0) b.turn();
    a.backend.close_peer(id);
    b.backend.close_peer(id);
    return posted.slices;
  };
  constexpr std::size_t kFullSpeed = 4 * 14;  // what four QPs take at once
  EXPECT_EQ(cycle(), kFullSpeed);
  // A QP that takes long to destroy keeps its share of the CQ until then.
  for (int i = 0; i < 2000; ++i) {
    ASSERT_TRUE(turn_until({&a, &b}, [&] { return fabric.live_objects() == objects; }));
    cycle();
  }
  EXPECT_TRUE(turn_until({&a, &b}, [&] { return cycle() == kFullSpeed; }));
  EXPECT_TRUE(turn_until({&a, &b}, [&] { return fabric.live_objects() == objects; }));
  EXPECT_EQ(a.count("verbs_qps"), 0U);
  for (const BackendNode* node : {&a, &b}) {
    for (const auto& [peer, seen] : node->seen) {
      EXPECT_TRUE(seen.errors.empty());
      for (const std::uint32_t imm : seen.imms) EXPECT_EQ(imm, peer);
    }
  }
}

TEST(VerbsLife, FailedRegistrationLeavesNothingBehind) {
  CleanFabric fabric(fake_fabric(2));
  BackendNode node(fabric, {"rxe0", "rxe1"});
  const std::size_t objects = fabric.live_objects();
  const std::uint64_t pinned = node.count("pinned_bytes");
  EXPECT_EQ(pinned, 2 * node.buffer.size());
  fabric.fail_next_reg_mr("rxe1", ENOMEM);
  EXPECT_THROW((void)node.backend.pin_memory(node.range(), {}), std::runtime_error);
  EXPECT_EQ(fabric.live_objects(), objects);
  EXPECT_EQ(node.count("pinned_bytes"), pinned);
  node.add_memory(1);
  EXPECT_EQ(fabric.live_objects(), objects + 2);
  node.backend.deregister_memory(1).reset();
  EXPECT_EQ(fabric.live_objects(), objects);
  EXPECT_EQ(node.backend.deregister_memory(1), nullptr);
}

/// The first QP is in RTS by the time the second one is refused.
TEST(VerbsLife, HalfConnectedPeersAreCleanedUp) {
  CleanFabric fabric(fake_fabric(2));
  BackendNode a(fabric, {"rxe0"});
  BackendNode b(fabric, {"rxe1"});
  const std::size_t objects = fabric.live_objects();
  (void)a.backend.create_endpoint(1);
  auto endpoint = decode_endpoint(b.backend.create_endpoint(1));
  endpoint[0].qps[1].number = 1 << 24;  // QPNs have 24 bits
  EXPECT_THROW(a.backend.connect(1, link_to(b, encode_endpoint(endpoint))), std::runtime_error);
  a.backend.probe(1);
  a.turn();
  a.backend.close_peer(1);
  b.backend.close_peer(1);
  EXPECT_TRUE(turn_until({&a, &b}, [&] { return fabric.live_objects() == objects; }));
  EXPECT_EQ(a.count("verbs_qps"), 0U);
}

/// A slice may be cut at one chunk edge of the peer, not at more.
TEST(VerbsLife, PeersWithShortChunksAreRefused) {
  CleanFabric fabric([] {
    FakeOptions options = fake_fabric(2);
    options.devices[1].max_mr_size = 64 << 10;
    return options;
  }());
  BackendNode a(fabric, {"rxe0"}, {.block_size = 128 << 10});
  BackendNode b(fabric, {"rxe1"}, {.block_size = 64 << 10});
  (void)a.backend.create_endpoint(1);
  const Bytes endpoint = b.backend.create_endpoint(1);
  EXPECT_THROW(a.backend.connect(1, link_to(b, endpoint)), FormatError);
}

TEST(VerbsLife, CpusAreThoseNearTheFirstPort) {
  const CleanFabric fabric(fake_fabric(1));
  Choice choice = choose_fakes(fabric, {"rxe0"});
  const auto cpus = [&](const char* list) {
    choice.ports[0].port.local_cpus = list;
    return VerbsBackend({}, FakeFabric::table(), choice).cpus();
  };
  EXPECT_EQ(cpus("0-2,8"), (std::vector<std::size_t>{0, 1, 2, 8}));
  EXPECT_TRUE(cpus("").empty());
  EXPECT_TRUE(cpus("all").empty());
}

TEST(VerbsLife, QpsBeyondThePeersGo) {
  CleanFabric fabric(fake_fabric(2));
  BackendNode a(fabric, {"rxe0"}, {.qps_per_peer = 4});
  BackendNode b(fabric, {"rxe1"}, {.qps_per_peer = 1});
  connect_nodes(a, b);
  EXPECT_EQ(a.count("verbs_qps"), 1U);
  ASSERT_TRUE(a.backend.post_signal(1, 5));
  EXPECT_TRUE(turn_until({&a, &b}, [&] { return b.seen[1].imms == std::vector{5U}; }));
}

TEST(VerbsLife, MemoryOfOtherRailsIsRefused) {
  CleanFabric fabric(fake_fabric(3));
  BackendNode a(fabric, {"rxe0"});
  BackendNode b(fabric, {"rxe1"});
  BackendNode both(fabric, {"rxe1", "rxe2"});
  (void)a.backend.create_endpoint(1);
  PeerLink link = link_to(both, b.backend.create_endpoint(1));
  EXPECT_THROW(a.backend.connect(1, std::move(link)), FormatError);
}

}  // namespace
}  // namespace rkv::verbs
