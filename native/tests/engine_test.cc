// SPDX-License-Identifier: Apache-2.0
/// What every backend must do; engine_verbs_test.cc runs the same suite over verbs.
#include <thread>
#include <utility>

#include "backends/backends.h"
#include "engine_pair.h"

namespace rkv {
namespace {

TEST_P(EngineTest, SignalMeansThatEveryEarlierWriteLanded) {
  constexpr std::size_t kBytes = 4 << 20;
  Side a = make_side(1, kBytes);
  Side b = make_side(2, kBytes);
  connect_both(a, b);
  std::mt19937_64 random(1);
  for (std::uint32_t round = 0; round < 8; ++round) {
    fill_random(a.buffer, random);
    const Columns rows = scattered_pages(a, b, std::size_t{4096} << (round % 3), random);
    // The signal goes along with the write, or is a call of its own.
    const bool along = round % 2 == 1;
    const TransferId id = rows.write(a, along ? std::optional(round) : std::nullopt);
    if (!along) a.engine.signal(a.endpoint.peer, round);
    EXPECT_EQ(b.expect(EventKind::kImm).imm, round);
    expect_landed(rows);
    EXPECT_EQ(a.expect(EventKind::kTransferDone).id, id);
  }
}

TEST_P(EngineTest, BothDirectionsAndMessagesAtOnceFromManyThreads) {
  constexpr std::size_t kBytes = 1 << 20;
  constexpr int kThreads = 3;
  constexpr int kWritesPerThread = 20;
  Side a = make_side(1, kBytes);
  Side b = make_side(2, kBytes);
  connect_both(a, b);
  const auto traffic = [](Side& from, const Side& to, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (std::uint32_t i = 0; i < kWritesPerThread; ++i) {
      // First half of everyone's memory is source, second half is target.
      const auto page = static_cast<std::int64_t>(random() % 60 + 1) * 1024;
      const Columns rows{
          .local = {static_cast<std::int64_t>(from.address(random() % 4096)),
                    static_cast<std::int64_t>(from.address(200000))},
          .remote = {static_cast<std::int64_t>(to.address(kBytes / 2 + random() % 4096)),
                     static_cast<std::int64_t>(to.address(kBytes / 2 + 200000))},
          .nbytes = {page, page}};
      rows.write(from);
      from.engine.signal(from.endpoint.peer, i);
      from.engine.send(from.endpoint.peer, Bytes(static_cast<std::size_t>(page), 'm'));
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t i = 0; i < kThreads; ++i) {
    threads.emplace_back(traffic, std::ref(a), std::cref(b), i);
    threads.emplace_back(traffic, std::ref(b), std::cref(a), i + kThreads);
  }
  for (std::thread& thread : threads) thread.join();
  constexpr int kTotal = kThreads * kWritesPerThread;
  for (Side* side : {&a, &b}) {
    const auto deadline = Clock::now() + engine_patience();
    std::map<EventKind, int> seen;
    while (Clock::now() < deadline &&
           (seen[EventKind::kTransferDone] < kTotal || seen[EventKind::kImm] < kTotal ||
            seen[EventKind::kMessage] < kTotal)) {
      if (!side->engine.wait(std::chrono::milliseconds(100))) continue;
      for (const Event& event : side->engine.poll(64)) ++seen[event.kind];
    }
    EXPECT_EQ(seen[EventKind::kTransferDone], kTotal);
    EXPECT_EQ(seen[EventKind::kImm], kTotal);
    EXPECT_EQ(seen[EventKind::kMessage], kTotal);
    EXPECT_EQ(seen[EventKind::kTransferFailed], 0);
  }
}

/// The caller posts itself while the progress thread sleeps.
TEST_P(EngineTest, SmallWritesWakeNoThread) {
  constexpr int kWrites = 100;
  Side a = make_side(1, 64 << 10);
  Side b = make_side(2, 64 << 10);
  connect_both(a, b);
  std::mt19937_64 random(4);
  const Columns rows = scattered_pages(a, b, 4096, random);
  const auto wakeups = [&] { return std::get<std::uint64_t>(a.engine.stats().at("wakeups")); };
  const std::uint64_t before = wakeups();
  for (int i = 0; i < kWrites; ++i) {
    rows.write(a);
    a.expect(EventKind::kTransferDone);
    // So that the progress thread has seen it out and sleeps again.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_LT(wakeups() - before, kWrites / 2);
}

TEST_P(EngineTest, ClosePeerEndsEveryWriteExactlyOnce) {
  constexpr std::size_t kBytes = 8 << 20;
  Side a = make_side(1, kBytes);
  Side b = make_side(2, kBytes);
  connect_both(a, b);
  std::mt19937_64 random(2);
  const Columns rows = scattered_pages(a, b, 4096, random);
  for (int i = 0; i < 10; ++i) rows.write(a);
  b.engine.close_peer(b.endpoint.peer);
  const std::vector<unsigned char> fenced = b.buffer;
  const Event lost = a.expect(EventKind::kPeerLost);
  EXPECT_NE(lost.reason.find("close_peer() was called"), std::string::npos) << lost.reason;
  EXPECT_EQ(a.seen[EventKind::kTransferDone] + a.seen[EventKind::kTransferFailed], 10);
  EXPECT_EQ(b.buffer, fenced);
  EXPECT_THROW((void)rows.write(a), std::runtime_error);
  EXPECT_THROW((void)rows.write(b), std::invalid_argument);
}

TEST_P(EngineTest, CloseWhileTrafficRuns) {
  constexpr std::size_t kBytes = 8 << 20;
  Side a = make_side(1, kBytes);
  Side b = make_side(2, kBytes);
  connect_both(a, b);
  std::mt19937_64 random(3);
  const Columns rows = scattered_pages(a, b, 16384, random);
  for (int i = 0; i < 5; ++i) rows.write(a);
  std::thread closer([&] { b.engine.close(); });
  a.engine.close();
  closer.join();
  EXPECT_THROW((void)a.engine.stats(), std::runtime_error);
}

/// The backend that the configuration names, on this host.
class HostNetwork final : public Network {
 public:
  std::unique_ptr<Backend> create_backend(std::size_t /*engine*/,
                                          const EngineConfig& config) override {
    return rkv::create_backend(config);
  }
};

EngineParam on_this_host(std::string name, EngineConfig config) {
  return {std::move(name), std::move(config), [] { return std::make_unique<HostNetwork>(); }};
}

INSTANTIATE_TEST_SUITE_P(Tcp, EngineTest,
                         testing::Values(on_this_host("defaults", {.backend = "tcp"}),
                                         on_this_host("small_blocks", {.backend = "tcp",
                                                                       .block_size = 4096,
                                                                       .queue_depth = 3,
                                                                       .qps_per_peer = 4,
                                                                       .spin_us = 0}),
                                         on_this_host("one_lane_spinning", {.backend = "tcp",
                                                                            .qps_per_peer = 1,
                                                                            .spin_us = 500})),
                         name_of);

/// RKV_TEST_BACKEND=verbs adds this host's RDMA devices.
std::vector<EngineParam> real_verbs() {
  const char* backend = std::getenv("RKV_TEST_BACKEND");
  if (backend == nullptr || std::string(backend) != "verbs") return {};
  return {on_this_host("defaults", {.backend = "verbs"}),
          on_this_host("four_qps", {.backend = "verbs", .block_size = 65536, .qps_per_peer = 4})};
}

INSTANTIATE_TEST_SUITE_P(RealVerbs, EngineTest, testing::ValuesIn(real_verbs()), name_of);

}  // namespace
}  // namespace rkv
