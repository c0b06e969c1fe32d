// SPDX-License-Identifier: Apache-2.0
/// Signals: none before the bytes written ahead of it, none before an earlier signal.
#include <arpa/inet.h>
#include <gtest/gtest.h>

#include <deque>
#include <random>

#include "backend_node.h"

namespace rkv::verbs {
namespace {

struct Fabric {
  std::string name;
  EngineConfig config = {};
  FakeOptions options = {.delivery = FakeDelivery::kDeferred,
                         .max_delay = std::chrono::microseconds(300)};
  FakeDeviceOptions device = {};
  std::size_t rails_a = 1;
  std::size_t rails_b = 1;
};

std::ostream& operator<<(std::ostream& out, const Fabric& fabric) { return out << fabric.name; }

class Signals : public testing::TestWithParam<std::tuple<Fabric, std::uint64_t>> {};

/// Random writes and signals, paused at random so that each QP is idle at times: which QPs a signal
/// takes depends on that.
class RandomTraffic {
 public:
  RandomTraffic(NodePair& pair, std::uint64_t seed) : pair_(pair), random_(seed) {
    for (std::size_t i = 0; i < pair.a.buffer.size(); ++i) {
      pair.a.buffer[i] = static_cast<unsigned char>(random_());
    }
  }

  void write() {
    // Every write has a target of its own, so that it can be compared for as long as the test runs.
    std::vector<WriteSlice> slices;
    for (std::uint64_t i = random_() % 8 + 1; i > 0; --i) {
      const std::size_t nbytes = random_() % 2 == 0 ? random_() % 300 + 1 : random_() % 6000 + 1;
      if (target_ + nbytes > pair_.b.buffer.size()) break;
      const std::size_t from = random_() % (pair_.a.buffer.size() - nbytes);
      slices.push_back(pair_.a.slice(from, pair_.b, target_, nbytes));
      target_ += nbytes + random_() % 2;
    }
    if (slices.empty()) return;
    const bool signals = random_() % 3 == 0;
    bool signalled = false;
    post([&, rest = std::span<const WriteSlice>(slices)]() mutable {
      const Posted posted = pair_.a.backend.post_writes(
          1, 1, rest, signals ? std::optional(next_imm_) : std::nullopt);
      rest = rest.subspan(posted.slices);
      signalled = posted.signalled;
      return rest.empty();
    });
    written_.insert(written_.end(), slices.begin(), slices.end());
    if (signalled) note_signal();
    if (signals && !signalled) signal();
  }
  void signal() {
    post([&] { return pair_.a.backend.post_signal(1, next_imm_); });
    note_signal();
  }
  void maybe_pause() {
    if (random_() % 4 != 0) return;
    for (std::uint64_t turns = random_() % 20; turns > 0; --turns) turn();
  }
  /// @return whether all signals came in time.
  [[nodiscard]] bool finish() {
    return pair_.turn_until([&] {
      check();
      return checked_signals_ == next_imm_;
    });
  }
  [[nodiscard]] std::uint32_t signals() const { return next_imm_; }

 private:
  void turn() {
    pair_.a.turn();
    pair_.b.turn();
    check();
  }
  void post(const std::function<bool()>& attempt) {
    ASSERT_TRUE(pair_.turn_until([&] {
      check();
      return attempt();
    }));
  }
  void note_signal() {
    promised_.push_back(written_.size());
    ++next_imm_;
  }
  /// What each signal that came had promised must be there.
  void check() {
    for (const std::vector<std::uint32_t>& imms = pair_.b.seen[1].imms;
         checked_signals_ < imms.size(); ++checked_signals_) {
      ASSERT_EQ(imms[checked_signals_], checked_signals_);
      for (; checked_slices_ < promised_.at(checked_signals_); ++checked_slices_) {
        const WriteSlice& slice = written_[checked_slices_];
        ASSERT_EQ(std::memcmp(reinterpret_cast<const void*>(slice.local_address),
                              reinterpret_cast<const void*>(slice.remote_address), slice.nbytes),
                  0)
            << "signal " << checked_signals_ << " overtook slice " << checked_slices_;
      }
    }
    for (const auto* node : {&pair_.a, &pair_.b}) {
      for (const auto& [peer, seen] : node->seen) ASSERT_TRUE(seen.errors.empty());
    }
  }

  NodePair& pair_;
  std::mt19937_64 random_;
  std::size_t target_ = 0;
  std::vector<WriteSlice> written_;
  std::deque<std::size_t> promised_;  // slices ahead of each signal
  std::uint32_t next_imm_ = 0;
  std::size_t checked_signals_ = 0;
  std::size_t checked_slices_ = 0;
};

TEST_P(Signals, OvertakeNoWriteAndNoSignal) {
  Fabric fabric = std::get<0>(GetParam());
  fabric.options.seed = std::get<1>(GetParam());
  NodePair pair(fabric.config, fabric.options, fabric.device, fabric.rails_a, fabric.rails_b);
  RandomTraffic traffic(pair, fabric.options.seed);
  for (int i = 0; i < 150 && !HasFatalFailure(); ++i) {
    i % 3 == 2 ? traffic.signal() : traffic.write();
    traffic.maybe_pause();
  }
  EXPECT_TRUE(traffic.finish());
  EXPECT_GT(traffic.signals(), 50U);
}

INSTANTIATE_TEST_SUITE_P(
    Deferred, Signals,
    testing::Combine(
        testing::Values(
            Fabric{.name = "two_qps"},
            Fabric{.name = "two_rails", .config = {.qps_per_peer = 4}, .rails_a = 2, .rails_b = 2},
            Fabric{.name = "one_rail_to_two", .rails_b = 2},
            Fabric{.name = "two_rails_to_one", .rails_a = 2},
            Fabric{.name = "tiny_device",
                   .config = {.qps_per_peer = 4},
                   .device = {.max_qp_wr = 16, .max_cqe = 64, .max_srq_wr = 128}}),
        testing::Range<std::uint64_t>(1, 7)),
    [](const auto& info) {
      return std::get<0>(info.param).name + "_" + std::to_string(std::get<1>(info.param));
    });

TEST(SignalCost, OneWrWithTheLastWriteOfAnIdlePeer) {
  for (const std::size_t rails : {1U, 2U}) {
    NodePair pair({.qps_per_peer = 4}, {}, {}, rails, rails);
    const std::vector slices{pair.a.slice(0, pair.b, 0, 4096)};
    const Posted posted = pair.a.backend.post_writes(1, 1, slices, 7);
    EXPECT_EQ(posted.slices, 1U);
    EXPECT_TRUE(posted.signalled);
    const FakeCounters counters = pair.fabric.counters();
    EXPECT_EQ(counters.wrs, 1U);
    EXPECT_EQ(counters.doorbells, 1U);
    EXPECT_EQ(counters.signaled, 1U);
    EXPECT_TRUE(pair.turn_until([&] { return pair.b.seen[1].imms == std::vector{7U}; }));
  }
}

TEST(SignalCost, OneEmptyWrToAnIdlePeer) {
  NodePair pair({.qps_per_peer = 4});
  EXPECT_TRUE(pair.a.backend.post_signal(1, 7));
  EXPECT_EQ(pair.fabric.counters().wrs, 1U);
  EXPECT_EQ(pair.fabric.counters().bytes, 0U);
}

TEST(SignalCost, OneOnEveryQpWhileSeveralAreBusy) {
  NodePair pair({.block_size = 1 << 20, .qps_per_peer = 4});
  const auto slices = pair.a.backward_slices(pair.b, 4, 64 << 10);
  const Posted posted = pair.a.backend.post_writes(1, 1, slices, 7);
  EXPECT_EQ(posted.slices, 4U);
  EXPECT_FALSE(posted.signalled);
  EXPECT_EQ(pair.fabric.counters().wrs, 4U);
  EXPECT_TRUE(pair.a.backend.post_signal(1, 7));
  EXPECT_EQ(pair.fabric.counters().wrs, 8U);
  EXPECT_TRUE(pair.turn_until([&] { return !pair.b.seen[1].imms.empty(); }));
  EXPECT_EQ(pair.b.seen[1].imms, std::vector{7U});
}

/// An acknowledgement says that the other NIC has the bytes, not that they are in memory by the
/// time another NIC of that host reports something.
TEST(SignalCost, AnotherRailThatCarriedSomethingSignalsToo) {
  NodePair pair({}, {}, {}, 2, 2);
  const auto slices = pair.a.backward_slices(pair.b, 2, 64 << 10);
  EXPECT_EQ(pair.a.backend.post_writes(1, 1, slices, {}).slices, 2U);
  ASSERT_TRUE(pair.turn_until([&] { return pair.a.seen[1].landed[1] == 2; }));
  EXPECT_EQ(pair.fabric.counters("rxe0").wrs, 1U);
  EXPECT_EQ(pair.fabric.counters("rxe1").wrs, 1U);
  EXPECT_TRUE(pair.a.backend.post_signal(1, 7));
  EXPECT_EQ(pair.fabric.counters().wrs, 4U);
}

/// One NIC here and two there: what the peer's NICs report is in no order either.
TEST(SignalOrder, KeepTheirOrderAcrossTheRailsOfThePeer) {
  NodePair pair({}, {}, {}, 1, 2);
  const auto slices = pair.a.backward_slices(pair.b, 2, 64 << 10);
  pair.fabric.stall("rxe2");
  EXPECT_EQ(pair.a.backend.post_writes(1, 1, slices, {}).slices, 2U);
  ASSERT_TRUE(pair.turn_until([&] { return pair.a.seen[1].landed[1] == 1; }));
  EXPECT_TRUE(pair.a.backend.post_signal(1, 1));  // The QP to rxe2 is the only busy one.
  pair.fabric.stall("rxe2", false);
  // The peer polls nothing meanwhile, rxe1 first then.
  ASSERT_TRUE(turn_until({&pair.a}, [&] { return pair.a.seen[1].landed[1] == 2; }));
  while (pair.a.turn()) {
  }
  EXPECT_TRUE(pair.a.backend.post_signal(1, 2));
  ASSERT_TRUE(pair.turn_until([&] { return pair.b.seen[1].imms.size() == 2; }));
  EXPECT_EQ(pair.b.seen[1].imms, (std::vector{1U, 2U}));
}

/// A receiver whose progress thread is held up for a while is not lost: RNR retries do not end.
TEST(SignalOrder, WaitForAReceiverThatIsHeldUp) {
  NodePair pair({.queue_depth = 1024}, {}, {.max_srq_wr = 256});
  std::uint32_t posted = 0;
  // More than the peer has receives, until this side's queue is full.
  const auto post_some = [&] {
    while (posted < 3000 && pair.a.backend.post_signal(1, posted)) ++posted;
    return posted == 3000;
  };
  for (int i = 0; i < 50; ++i) {
    post_some();
    pair.a.turn();
  }
  EXPECT_GT(posted, 256U);
  EXPECT_LT(posted, 3000U);
  EXPECT_TRUE(pair.turn_until([&] { return post_some() && pair.b.seen[1].imms.size() == 3000; }));
  for (std::uint32_t i = 0; i < 3000; ++i) ASSERT_EQ(pair.b.seen[1].imms[i], i);
  EXPECT_TRUE(pair.a.seen[1].errors.empty());
  EXPECT_TRUE(pair.b.seen[1].errors.empty());
}

}  // namespace
}  // namespace rkv::verbs
