// SPDX-License-Identifier: Apache-2.0
/// What breaks: peers, ports, keys.
#include <gtest/gtest.h>

#include <algorithm>

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

}  // namespace
}  // namespace rkv::verbs
