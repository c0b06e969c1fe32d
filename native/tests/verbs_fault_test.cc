// SPDX-License-Identifier: Apache-2.0
/// What breaks: peers, ports, keys; and the fence.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>

#include "backend_node.h"

namespace rkv::verbs {
namespace {

using std::chrono::milliseconds;

constexpr std::size_t kBlock = 4096;

EngineConfig with_timeout(double seconds) { return {.qps_per_peer = 2, .peer_timeout_s = seconds}; }

TEST(VerbsFault, DeadPeerIsReportedWithinThePeerTimeout) {
  NodePair pair(with_timeout(0.3));
  pair.fabric.drop_all_from("rxe1");
  const Clock::time_point start = Clock::now();
  pair.write(1, pair.a.backward_slices(pair.b, 8, kBlock));
  const std::string error = pair.error_at(pair.a);
  const auto took = Clock::now() - start;
  EXPECT_GT(took, milliseconds(150));  // retries are not given up early
  EXPECT_LT(took, milliseconds(1300));
  EXPECT_TRUE(has_words(error, {"rxe0:1 QP 17 to ::ffff:192.0.2.2", "WRITE failed with",
                                "transport retry counter exceeded", "status 12",
                                "the peer's QP or node is gone", "4791"}));
  EXPECT_EQ(error.find("DOWN"), std::string::npos);
  EXPECT_TRUE(pair.a.seen[1].landed.empty());
  for (int i = 0; i < 20; ++i) pair.a.turn();
  EXPECT_EQ(pair.a.seen[1].errors.size(), 1U);  // once, whatever else of it fails
  EXPECT_EQ(pair.a.backend.post_writes(1, 2, pair.a.backward_slices(pair.b, 1, 64), {}).slices, 0U);
  EXPECT_FALSE(pair.a.backend.post_signal(1, 1));
}

/// Nothing but the probe asks after an idle peer.
TEST(VerbsFault, IdlePeerIsProbed) {
  NodePair pair(with_timeout(0.1));
  pair.fabric.drop_all_from("rxe1");
  pair.a.backend.probe(1);
  EXPECT_TRUE(has_words(pair.error_at(pair.a), {"keep-alive", "retry counter exceeded"}));
}

TEST(VerbsFault, SignalsAreNamed) {
  NodePair pair(with_timeout(0.1));
  pair.fabric.drop_all_from("rxe1");
  EXPECT_TRUE(pair.a.backend.post_signal(1, 7));
  EXPECT_TRUE(has_words(pair.error_at(pair.a), {"signal", "retry counter exceeded"}));
}

/// A device that hangs ends no retries either.
TEST(VerbsFault, StallIsFoundByTheProbe) {
  NodePair pair(with_timeout(0.1));
  pair.fabric.stall("rxe0");
  pair.write(1, pair.a.backward_slices(pair.b, 1, kBlock));
  pair.a.backend.probe(1);
  pair.a.turn();
  EXPECT_TRUE(pair.a.seen[1].errors.empty());
  std::this_thread::sleep_for(milliseconds(110));
  pair.a.backend.probe(1);
  EXPECT_TRUE(
      has_words(pair.error_at(pair.a), {"rxe0:1 QP", "192.0.2.2", "peer_timeout_s", "stalled"}));
}

TEST(VerbsFault, DownPortIsNamed) {
  NodePair pair(with_timeout(0.1));
  pair.fabric.port_down("rxe0");
  pair.write(1, pair.a.backward_slices(pair.b, 1, kBlock));
  EXPECT_TRUE(has_words(pair.error_at(pair.a), {"rxe0:1", "this node's port is DOWN"}));
}

TEST(VerbsFault, LinkThatComesBackInTimeCostsNothing) {
  NodePair pair(with_timeout(20));
  const auto slices = pair.a.backward_slices(pair.b, 32, kBlock);
  std::fill(pair.a.buffer.begin(), pair.a.buffer.end(), 7);
  for (const char* device : {"rxe0", "rxe1"}) {
    pair.fabric.port_down(device);
    const TransferId transfer = device[3] == '0' ? 1 : 2;
    pair.write(transfer, slices);
    std::this_thread::sleep_for(milliseconds(20));
    pair.a.turn();
    EXPECT_TRUE(pair.a.seen[1].landed[transfer] == 0);
    pair.fabric.port_up(device);
    EXPECT_TRUE(pair.turn_until([&] { return pair.a.seen[1].landed[transfer] == 32; }));
  }
  EXPECT_EQ(pair.b.buffer[0], 7);
  EXPECT_TRUE(pair.a.seen[1].errors.empty());
  EXPECT_TRUE(pair.b.seen[1].errors.empty());
}

TEST(VerbsFault, WriteIntoDeregisteredMemoryBreaksBothEndsOfThatPeerOnly) {
  CleanFabric fabric(fake_fabric(3));
  BackendNode a(fabric, {"rxe0"});
  BackendNode b(fabric, {"rxe1"});
  BackendNode c(fabric, {"rxe2"});
  const Bytes second_keys = b.add_memory(1);
  const auto link_to_both = [&](const Bytes& endpoint) {
    PeerLink link = link_to(b, endpoint);
    link.memory.push_back({b.range(), second_keys});
    return link;
  };
  const Bytes from_a = a.backend.create_endpoint(1);
  a.backend.connect(1, link_to_both(b.backend.create_endpoint(1)));
  b.backend.connect(1, link_to(a, from_a));
  connect_nodes(c, b, 2);
  b.backend.deregister_memory(1).reset();
  WriteSlice slice = a.slice(0, b, 0, kBlock);
  slice.remote_region = 1;
  ASSERT_EQ(a.backend.post_writes(1, 1, std::vector{slice}, {}).slices, 1U);
  ASSERT_TRUE(
      turn_until({&a, &b}, [&] { return !a.seen[1].errors.empty() && !b.seen[1].errors.empty(); }));
  EXPECT_TRUE(has_words(a.seen[1].errors[0], {"rxe0:1 QP", "remote access error", "deregistered"}));
  EXPECT_TRUE(has_words(b.seen[1].errors[0], {"rxe1:1", "the peer wrote where it may not"}));
  EXPECT_EQ(b.count("verbs_async_events"),
            2U);  // the error, and that the QP takes no more receives
  // The third engine does not notice.
  b.backend.close_peer(1);
  std::fill(c.buffer.begin(), c.buffer.end(), 9);
  ASSERT_EQ(c.backend.post_writes(2, 5, c.backward_slices(b, 16, kBlock), {}).slices, 16U);
  ASSERT_TRUE(c.backend.post_signal(2, 5));
  ASSERT_TRUE(turn_until({&b, &c}, [&] { return b.seen[2].imms == std::vector{5U}; }));
  EXPECT_EQ(std::count(b.buffer.begin(), b.buffer.end(), 9), 16 * kBlock);
  EXPECT_TRUE(b.seen[2].errors.empty());
  EXPECT_TRUE(c.seen[2].errors.empty());
}

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

}  // namespace
}  // namespace rkv::verbs
