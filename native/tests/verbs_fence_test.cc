// SPDX-License-Identifier: Apache-2.0
/// The fence: what close_peer() and deregister_memory() promise.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>

#include "backend_node.h"

namespace rkv::verbs {
namespace {

using std::chrono::milliseconds;

constexpr std::size_t kBlock = 4096;
constexpr milliseconds kMaxDelay{20};

/// What is posted takes its time, unless the test machine is slower still.
FakeOptions slow(std::uint64_t seed) {
  return {.delivery = FakeDelivery::kDeferred, .seed = seed, .max_delay = kMaxDelay};
}

/// Writes that fill the peer's buffer with `value`.
void start_filling(NodePair& pair, unsigned char value) {
  std::fill(pair.a.buffer.begin(), pair.a.buffer.end(), value);
  pair.write(value, pair.a.backward_slices(pair.b, 256, kBlock));
}

std::ptrdiff_t count(const BackendNode& node, unsigned char value) {
  return std::count(node.buffer.begin(), node.buffer.end(), value);
}

TEST(VerbsFence, NothingLandsAfterTheReceiverClosedThePeer) {
  bool cut_short = false;
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    NodePair pair({.qps_per_peer = 4}, slow(seed));
    start_filling(pair, 1);
    std::this_thread::sleep_for(milliseconds(seed - 1));
    pair.b.backend.close_peer(1);
    const std::vector<unsigned char> fenced = pair.b.buffer;
    std::this_thread::sleep_for(kMaxDelay);
    EXPECT_EQ(pair.b.buffer, fenced);
    cut_short |= count(pair.b, 0) > 0;
  }
  EXPECT_TRUE(cut_short);
}

TEST(VerbsFence, SourceIsFreeAfterTheSenderClosedThePeer) {
  bool cut_short = false;
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    NodePair pair({.qps_per_peer = 4}, slow(seed));
    start_filling(pair, 1);
    std::this_thread::sleep_for(milliseconds(seed - 1));
    pair.a.backend.close_peer(1);
    std::fill(pair.a.buffer.begin(), pair.a.buffer.end(), 0xee);
    std::this_thread::sleep_for(kMaxDelay);
    EXPECT_EQ(count(pair.b, 0xee), 0);
    cut_short |= count(pair.b, 0) > 0;
    pair.a.turn();
    EXPECT_TRUE(pair.a.seen[1].errors.empty());
  }
  EXPECT_TRUE(cut_short);
}

TEST(VerbsFence, NothingIsReadFromDeregisteredMemory) {
  NodePair pair;
  pair.fabric.stall("rxe0");
  start_filling(pair, 1);
  pair.a.backend.deregister_memory(0).reset();
  std::fill(pair.a.buffer.begin(), pair.a.buffer.end(), 0xee);
  pair.fabric.stall("rxe0", false);
  EXPECT_TRUE(has_words(pair.error_at(pair.a),
                        {"local protection error", "source memory was deregistered"}));
  EXPECT_EQ(count(pair.b, 0), static_cast<std::ptrdiff_t>(pair.b.buffer.size()));
}

/// The peers whose writes meet a deregistered region are lost, at both ends.
TEST(VerbsFence, NothingLandsInDeregisteredMemory) {
  NodePair pair;
  start_filling(pair, 1);
  pair.fabric.stall("rxe0");
  start_filling(pair, 2);
  pair.b.backend.deregister_memory(0).reset();
  pair.fabric.stall("rxe0", false);
  EXPECT_NE(pair.error_at(pair.a), "");
  EXPECT_NE(pair.error_at(pair.b), "");
  EXPECT_EQ(count(pair.b, 1), static_cast<std::ptrdiff_t>(pair.b.buffer.size()));
}

std::atomic<bool> stuck = false;

/// As Soft-RoCE does while packets of the QP are stuck on the way out.
int destroy_when_free(ibv_qp* qp) {
  while (stuck) std::this_thread::sleep_for(milliseconds(1));
  return FakeFabric::table().destroy_qp(qp);
}

Ibverbs slow_to_destroy() {
  Ibverbs lib = FakeFabric::table();
  lib.destroy_qp = destroy_when_free;
  return lib;
}

const Ibverbs kSlowToDestroy = slow_to_destroy();

TEST(VerbsFence, HoldsWhileQpsCannotBeDestroyed) {
  CleanFabric fabric(fake_fabric(3, {}, {.max_qp_wr = 16, .max_cqe = 64, .max_srq_wr = 128}));
  const EngineConfig config{.qps_per_peer = 4};
  BackendNode a(fabric, {"rxe0"}, config);
  BackendNode b(fabric, {"rxe1"}, config, 1 << 20, kSlowToDestroy);
  BackendNode c(fabric, {"rxe2"}, config);
  connect_nodes(a, b, 1);
  connect_nodes(b, c, 2);
  std::fill(a.buffer.begin(), a.buffer.end(), 1);
  std::fill(b.buffer.begin(), b.buffer.end(), 2);
  fabric.stall("rxe1");  // so that all is on its way still when the peer is closed
  EXPECT_EQ(a.backend.post_writes(1, 1, a.backward_slices(b, 56, kBlock), {}).slices, 56U);
  EXPECT_EQ(b.backend.post_writes(1, 1, b.backward_slices(a, 56, kBlock), {}).slices, 56U);
  stuck = true;
  const Clock::time_point start = Clock::now();
  b.backend.close_peer(1);
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(2));  // the progress thread goes on
  fabric.stall("rxe1", false);
  b.turn();
  EXPECT_EQ(count(a, 2), 0);
  EXPECT_EQ(count(b, 1), 0);
  EXPECT_EQ(b.seen.count(1), 0U);
  // The stuck QPs keep their 56 of 64 CQEs, but no more than those.
  const auto slices = b.backward_slices(c, 64, 64);
  const std::size_t posted = b.backend.post_writes(2, 1, slices, {}).slices;
  EXPECT_GT(posted, 0U);
  EXPECT_LE(posted, 8U);
  EXPECT_TRUE(turn_until({&b, &c}, [&] { return b.seen[2].landed[1] == posted; }));
  stuck = false;
  // Seven objects a node, and all QPs but those four.
  EXPECT_TRUE(turn_until({&b}, [&] { return fabric.live_objects() == 3 * 7 + 3 * 4; }));
  EXPECT_TRUE(
      turn_until({&b, &c}, [&] { return b.backend.post_writes(2, 2, slices, {}).slices == 56; }));
}

/// The reaper has what it needs, whatever goes first.
TEST(VerbsFence, BackendMayGoBeforeItsStuckQps) {
  CleanFabric fabric(fake_fabric(2));
  {
    BackendNode a(fabric, {"rxe0"}, {}, 1 << 20, kSlowToDestroy);
    BackendNode b(fabric, {"rxe1"});
    connect_nodes(a, b);
    stuck = true;
    a.backend.close_peer(1);
  }
  EXPECT_GT(fabric.live_objects(), 0U);
  stuck = false;
}

/// Completions that were polled before close_peer() but not handed out yet.
TEST(VerbsFence, NoCompletionFollowsTheClose) {
  NodePair pair;
  pair.write(1, pair.a.backward_slices(pair.b, 8, kBlock));
  ASSERT_TRUE(pair.a.backend.post_signal(1, 1));
  (void)pair.a.backend.arm();  // polls
  (void)pair.b.backend.arm();
  pair.a.backend.close_peer(1);
  pair.b.backend.close_peer(1);
  pair.a.seen.clear();
  pair.a.turn();
  pair.b.turn();
  EXPECT_TRUE(pair.a.seen.empty());
  EXPECT_TRUE(pair.b.seen.empty());
}

/// What a closed peer's QPs left in the CQ is taken out before others get its room.
TEST(VerbsFence, CqesOfAClosedPeerLeaveRoomForOthers) {
  CleanFabric fabric(fake_fabric(3, {}, {.max_qp_wr = 16, .max_cqe = 64, .max_srq_wr = 128}));
  const EngineConfig config{.qps_per_peer = 4};
  BackendNode a(fabric, {"rxe0"}, config);
  BackendNode b(fabric, {"rxe1"}, config);
  BackendNode c(fabric, {"rxe2"}, config);
  connect_nodes(a, b, 1);
  connect_nodes(a, c, 2);
  fabric.stall("rxe1");  // so that all of it is flushed, a CQE for every WR
  EXPECT_EQ(a.backend.post_writes(1, 1, a.backward_slices(b, 64, kBlock), {}).slices, 56U);
  a.backend.close_peer(1);
  fabric.stall("rxe2");
  EXPECT_TRUE(turn_until({&a}, [&, n = std::size_t{0}]() mutable {
    n += a.backend.post_writes(2, 1, a.backward_slices(c, 64, kBlock), {}).slices;
    return n >= 56;
  }));
  a.backend.close_peer(2);
  EXPECT_FALSE(fabric.overflowed());
}

/// Signals of a peer that was closed stay in the CQ under a QPN that its successor has.
TEST(VerbsFence, StaleCqesDoNotReachTheNextPeer) {
  CleanFabric fabric(fake_fabric(2, {.reuse_qpns = true}));
  BackendNode a(fabric, {"rxe0"});
  BackendNode b(fabric, {"rxe1"});
  connect_nodes(a, b, 1);
  const std::vector slices{a.slice(0, b, 0, 64)};
  ASSERT_TRUE(a.backend.post_signal(1, 111));
  ASSERT_EQ(a.backend.post_writes(1, 1, slices, {}).slices, 1U);
  b.backend.close_peer(1);
  a.backend.close_peer(1);
  connect_nodes(a, b, 2);
  ASSERT_TRUE(a.backend.post_signal(2, 222));
  ASSERT_TRUE(turn_until({&a, &b}, [&] { return !b.seen[2].imms.empty(); }));
  EXPECT_EQ(b.seen[2].imms, std::vector{222U});
  a.turn();
  EXPECT_TRUE(a.seen[1].landed.empty());
  EXPECT_TRUE(a.seen[2].landed.empty());
}

/// A number is free as soon as its QP is destroyed, which the backend may notice later.
TEST(VerbsFence, StaleCqesOfAQpThatTookLongDoNotReachTheNextPeer) {
  CleanFabric fabric(fake_fabric(2, {.reuse_qpns = true}));
  BackendNode a(fabric, {"rxe0"});
  BackendNode b(fabric, {"rxe1"}, {}, 1 << 20, kSlowToDestroy);
  connect_nodes(a, b, 1);
  ASSERT_TRUE(a.backend.post_signal(1, 111));
  stuck = true;
  b.backend.close_peer(1);
  const std::size_t with_qps = fabric.live_objects();
  stuck = false;
  ASSERT_TRUE(turn_until({}, [&] { return fabric.live_objects() == with_qps - 2; }));
  a.backend.close_peer(1);
  connect_nodes(a, b, 2);
  ASSERT_TRUE(a.backend.post_signal(2, 222));
  ASSERT_TRUE(turn_until({&a, &b}, [&] { return !b.seen[2].imms.empty(); }));
  EXPECT_EQ(b.seen[2].imms, std::vector{222U});
}

}  // namespace
}  // namespace rkv::verbs
