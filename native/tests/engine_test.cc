// SPDX-License-Identifier: Apache-2.0
/// Two engines in one process over loopback, so that the sanitizers see both sides.
#include "core/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <thread>

#include "backends/backends.h"

namespace rkv {
namespace {

constexpr std::chrono::seconds kPatience{20};

struct Side {
  explicit Side(std::uint64_t incarnation, const EngineConfig& config, std::size_t nbytes)
      : engine(config, incarnation, create_backend(config)),
        buffer(nbytes),
        memory(engine.register_memory({address(0), nbytes})),
        endpoint(engine.create_endpoint("peer-of-" + std::to_string(incarnation))) {}

  [[nodiscard]] std::uint64_t address(std::size_t offset) const {
    return reinterpret_cast<std::uint64_t>(buffer.data()) + offset;
  }
  void connect(const Side& other) {
    engine.connect(endpoint.peer, other.endpoint.descriptor, {other.memory.descriptor});
  }
  /// Takes events until one of `kind` arrives, counting all.
  Event expect(EventKind kind) {
    const auto deadline = Clock::now() + kPatience;
    while (Clock::now() < deadline) {
      if (backlog_.empty() && engine.events().wait(std::chrono::milliseconds(100))) {
        for (Event& event : engine.events().poll(64)) backlog_.push_back(std::move(event));
      }
      while (!backlog_.empty()) {
        Event event = std::move(backlog_.front());
        backlog_.pop_front();
        ++seen[event.kind];
        if (event.kind == kind) return event;
      }
    }
    ADD_FAILURE() << "no event of kind " << static_cast<int>(kind);
    return {};
  }

  Engine engine;
  std::vector<unsigned char> buffer;
  RegisteredMemory memory;
  CreatedEndpoint endpoint;
  std::map<EventKind, int> seen;

 private:
  std::deque<Event> backlog_;
};

void connect_both(Side& a, Side& b) {
  a.connect(b);
  b.connect(a);
  a.expect(EventKind::kConnected);
  b.expect(EventKind::kConnected);
}

struct Rows {
  std::vector<std::int64_t> local;
  std::vector<std::int64_t> remote;
  std::vector<std::int64_t> nbytes;
};

/// Every page of `from` to a random other page of `to`.
Rows scattered_pages(const Side& from, const Side& to, std::size_t page, std::mt19937& random) {
  std::vector<std::size_t> order(from.buffer.size() / page);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  Rows rows;
  for (std::size_t i = 0; i < order.size(); ++i) {
    rows.local.push_back(static_cast<std::int64_t>(from.address(i * page)));
    rows.remote.push_back(static_cast<std::int64_t>(to.address(order[i] * page)));
    rows.nbytes.push_back(static_cast<std::int64_t>(page));
  }
  return rows;
}

void expect_landed(const Rows& rows) {
  for (std::size_t i = 0; i < rows.local.size(); ++i) {
    ASSERT_EQ(std::memcmp(reinterpret_cast<const void*>(rows.local[i]),
                          reinterpret_cast<const void*>(rows.remote[i]),
                          static_cast<std::size_t>(rows.nbytes[i])),
              0)
        << "row " << i;
  }
}

void fill_random(std::vector<unsigned char>& buffer, std::mt19937& random) {
  for (unsigned char& byte : buffer) byte = static_cast<unsigned char>(random());
}

class EngineTest : public testing::TestWithParam<EngineConfig> {};

TEST_P(EngineTest, SignalMeansThatEveryEarlierWriteLanded) {
  constexpr std::size_t kBytes = 4 << 20;
  Side a(1, GetParam(), kBytes);
  Side b(2, GetParam(), kBytes);
  connect_both(a, b);
  std::mt19937 random(1);
  for (std::uint32_t round = 0; round < 8; ++round) {
    fill_random(a.buffer, random);
    const Rows rows = scattered_pages(a, b, 4096 << (round % 3), random);
    const TransferId id = a.engine.write(a.endpoint.peer, rows.local, rows.remote, rows.nbytes);
    a.engine.signal(a.endpoint.peer, round);
    EXPECT_EQ(b.expect(EventKind::kImm).imm, round);
    expect_landed(rows);
    EXPECT_EQ(a.expect(EventKind::kTransferDone).id, id);
  }
}

TEST_P(EngineTest, BothDirectionsAndMessagesAtOnceFromManyThreads) {
  constexpr std::size_t kBytes = 1 << 20;
  constexpr int kThreads = 3;
  constexpr int kWritesPerThread = 20;
  Side a(1, GetParam(), kBytes);
  Side b(2, GetParam(), kBytes);
  connect_both(a, b);
  const auto traffic = [](Side& from, const Side& to, int seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    for (int i = 0; i < kWritesPerThread; ++i) {
      // First half of everyone's memory is source, second half is target.
      const auto page = static_cast<std::int64_t>(random() % 60 + 1) * 1024;
      const std::vector<std::int64_t> local{
          static_cast<std::int64_t>(from.address(random() % 4096)),
          static_cast<std::int64_t>(from.address(200000))};
      const std::vector<std::int64_t> remote{
          static_cast<std::int64_t>(to.address(kBytes / 2 + random() % 4096)),
          static_cast<std::int64_t>(to.address(kBytes / 2 + 200000))};
      (void)from.engine.write(from.endpoint.peer, local, remote, std::vector{page, page});
      from.engine.signal(from.endpoint.peer, static_cast<std::uint32_t>(i));
      from.engine.send(from.endpoint.peer, Bytes(static_cast<std::size_t>(page), 'm'));
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back(traffic, std::ref(a), std::cref(b), i);
    threads.emplace_back(traffic, std::ref(b), std::cref(a), i + kThreads);
  }
  for (std::thread& thread : threads) thread.join();
  constexpr int kTotal = kThreads * kWritesPerThread;
  for (Side* side : {&a, &b}) {
    const auto deadline = Clock::now() + kPatience;
    std::map<EventKind, int> seen;
    while (Clock::now() < deadline &&
           (seen[EventKind::kTransferDone] < kTotal || seen[EventKind::kImm] < kTotal ||
            seen[EventKind::kMessage] < kTotal)) {
      if (!side->engine.events().wait(std::chrono::milliseconds(100))) continue;
      for (const Event& event : side->engine.events().poll(64)) ++seen[event.kind];
    }
    EXPECT_EQ(seen[EventKind::kTransferDone], kTotal);
    EXPECT_EQ(seen[EventKind::kImm], kTotal);
    EXPECT_EQ(seen[EventKind::kMessage], kTotal);
    EXPECT_EQ(seen[EventKind::kTransferFailed], 0);
  }
}

TEST_P(EngineTest, ClosePeerEndsEveryWriteExactlyOnce) {
  constexpr std::size_t kBytes = 8 << 20;
  Side a(1, GetParam(), kBytes);
  Side b(2, GetParam(), kBytes);
  connect_both(a, b);
  std::mt19937 random(2);
  const Rows rows = scattered_pages(a, b, 4096, random);
  std::map<TransferId, int> ends;
  for (int i = 0; i < 10; ++i) {
    ends[a.engine.write(a.endpoint.peer, rows.local, rows.remote, rows.nbytes)] = 0;
  }
  b.engine.close_peer(b.endpoint.peer);
  const std::vector<unsigned char> fenced = b.buffer;
  const Event lost = a.expect(EventKind::kPeerLost);
  EXPECT_NE(lost.reason.find("close_peer() was called"), std::string::npos) << lost.reason;
  EXPECT_EQ(a.seen[EventKind::kTransferDone] + a.seen[EventKind::kTransferFailed], 10);
  EXPECT_EQ(b.buffer, fenced);
  EXPECT_THROW((void)a.engine.write(a.endpoint.peer, rows.local, rows.remote, rows.nbytes),
               std::runtime_error);
  EXPECT_THROW((void)b.engine.write(b.endpoint.peer, rows.local, rows.remote, rows.nbytes),
               std::invalid_argument);
}

TEST_P(EngineTest, CloseWhileTrafficRuns) {
  constexpr std::size_t kBytes = 8 << 20;
  Side a(1, GetParam(), kBytes);
  Side b(2, GetParam(), kBytes);
  connect_both(a, b);
  std::mt19937 random(3);
  const Rows rows = scattered_pages(a, b, 16384, random);
  for (int i = 0; i < 5; ++i) {
    (void)a.engine.write(a.endpoint.peer, rows.local, rows.remote, rows.nbytes);
  }
  std::thread closer([&] { b.engine.close(); });
  a.engine.close();
  closer.join();
  EXPECT_THROW((void)a.engine.stats(), std::runtime_error);
}

INSTANTIATE_TEST_SUITE_P(Configs, EngineTest,
                         testing::Values(EngineConfig{.backend = "tcp"},
                                         EngineConfig{.backend = "tcp",
                                                      .block_size = 4096,
                                                      .queue_depth = 3,
                                                      .qps_per_peer = 4,
                                                      .spin_us = 0},
                                         EngineConfig{
                                             .backend = "tcp", .qps_per_peer = 1, .spin_us = 500}),
                         [](const auto& info) { return "config" + std::to_string(info.index); });

}  // namespace
}  // namespace rkv
