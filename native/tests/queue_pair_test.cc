// SPDX-License-Identifier: Apache-2.0
#include "verbs/queue_pair.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "backend_node.h"

namespace rkv::verbs {
namespace {

using std::chrono::milliseconds;

constexpr double kTimeoutUnitUs = 4.096;

double all_retries_s(std::uint8_t exponent) {
  return kTimeoutUnitUs * static_cast<double>(std::uint64_t{1} << exponent) * (kRetryCount + 1) /
         1e6;
}

TEST(AckTimeout, AllRetriesEndWithinThePeerTimeout) {
  std::uint8_t last = 0;
  for (milliseconds timeout(10); timeout < std::chrono::hours(2); timeout += timeout / 7) {
    const std::uint8_t exponent = ack_timeout_exponent(timeout);
    EXPECT_GE(exponent, last);
    last = exponent;
    const double seconds = std::chrono::duration<double>(timeout).count();
    EXPECT_LE(all_retries_s(exponent), seconds);
    // And is the largest one that does: a smaller one would give up on a busy receiver.
    if (exponent < 31) {
      EXPECT_GT(all_retries_s(static_cast<std::uint8_t>(exponent + 1)), seconds);
    }
  }
}

TEST(AckTimeout, OfTheDefaultPeerTimeout) {
  EXPECT_EQ(ack_timeout_exponent(EngineConfig{}.peer_timeout()), 17);  // 7 times 0.54 s
}

TEST(AckTimeout, Bounds) {
  EXPECT_EQ(ack_timeout_exponent(milliseconds(0)), 8);
  EXPECT_EQ(ack_timeout_exponent(milliseconds(1)), 8);
  EXPECT_EQ(ack_timeout_exponent(std::chrono::hours(1000)), 31);
}

struct Ends {
  explicit Ends(const FakeOptions& options) : fabric(options) {}

  /// A path from one device to another with what they have in common.
  [[nodiscard]] Path path_to(const std::string& device) const {
    Path path{.global = true, .mtu = IBV_MTU_4096, .ack_timeout = 10};
    const ibv_gid gid = fabric.gid(device, 0);
    std::copy(std::begin(gid.raw), std::end(gid.raw), path.gid.begin());
    return path;
  }
  static std::string error(const std::function<void()>& call) {
    try {
      call();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }

  CleanFabric fabric;
  Rail rail{FakeFabric::table(), "rxe0", 1};
};

TEST(QueuePair, PsnsAreRandomAndOf24Bits) {
  Ends ends(fake_fabric(1));
  std::vector<std::uint32_t> psns;
  for (int i = 0; i < 20; ++i) psns.push_back(QueuePair(ends.rail, 16).address().psn);
  EXPECT_LE(*std::max_element(psns.begin(), psns.end()), kPsnMask);
  std::sort(psns.begin(), psns.end());
  psns.erase(std::unique(psns.begin(), psns.end()), psns.end());
  EXPECT_GT(psns.size(), 15U);
}

TEST(QueuePair, TakesWhatTheDeviceHas) {
  Ends rich(fake_fabric(1));
  const QueuePair large(rich.rail, 128);
  EXPECT_EQ(large.max_sge(), 16U);
  EXPECT_EQ(large.max_inline_bytes(), 220U);
  Ends poor(fake_fabric(1, {}, {.max_sge = 3}));
  EXPECT_EQ(QueuePair(poor.rail, 128).max_sge(), 3U);
}

TEST(QueuePair, WithoutInlineSends) {
  Ends ends(fake_fabric(1, {}, {.max_inline = 0}));
  const QueuePair qp(ends.rail, 128);
  EXPECT_EQ(qp.max_sge(), 1U);
  EXPECT_EQ(qp.max_inline_bytes(), 0U);
}

TEST(QueuePair, RefusalsNameCallRailErrnoAndRemedy) {
  Ends ends(fake_fabric(2, {}, {.max_qp_wr = 64}));
  EXPECT_TRUE(has_words(Ends::error([&] { QueuePair(ends.rail, 65); }),
                        {"ibv_create_qp(rxe0:1)", "EINVAL", "queue_depth"}));
  QueuePair qp(ends.rail, 64);
  EXPECT_TRUE(has_words(
      Ends::error([&] { qp.connect({.number = 1 << 24, .psn = 0}, ends.path_to("rxe1")); }),
      {"ibv_modify_qp(rxe0:1", "INIT to RTR", "EINVAL", "GIDs"}));
  Path without_grh = ends.path_to("rxe1");
  without_grh.global = false;  // RoCE has none without.
  EXPECT_NE(Ends::error([&] { qp.connect({.number = 17, .psn = 0}, without_grh); }), "");
  EXPECT_EQ(Ends::error([&] { qp.connect({.number = 17, .psn = 0}, ends.path_to("rxe1")); }), "");
  ibv_send_wr wr{};
  EXPECT_EQ(Ends::error([&] { qp.post(&wr); }), "");
}

TEST(QueuePair, PostingBeforeConnectIsAnError) {
  Ends ends(fake_fabric(1));
  QueuePair qp(ends.rail, 16);
  ibv_send_wr wr{};
  EXPECT_TRUE(has_words(
      Ends::error([&] { qp.post(&wr); }),
      {"ibv_post_send(rxe0:1, QP " + std::to_string(qp.address().number) + ")", "EINVAL"}));
}

TEST(Rail, NamesWhatIsMissing) {
  const CleanFabric fabric(fake_fabric(1));
  EXPECT_TRUE(has_words(Ends::error([] { Rail(FakeFabric::table(), "mlx5_9", 1); }),
                        {"mlx5_9:1", "ENODEV", "ibverbs-providers"}));
  EXPECT_TRUE(has_words(Ends::error([] { Rail(FakeFabric::table(), "rxe0", 2); }),
                        {"ibv_query_port(rxe0:2)", "EINVAL"}));
  EXPECT_EQ(fabric.live_objects(), 0U);
}

}  // namespace
}  // namespace rkv::verbs
