// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>

#include "backends/backends.h"
#include "engine_pair.h"
#include "paced/link.h"
#include "paced/paced_backend.h"

namespace rkv::paced {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr PeerId kPeer = 1;
constexpr PeerId kOther = 2;
constexpr std::uint64_t kMB = 1'000'000;

/// Takes at most `room` slices at a time; what it took has landed at the next progress(), unless
/// `lands` says otherwise.
class InstantBackend final : public Backend {
 public:
  std::size_t room = SIZE_MAX;
  bool lands = true;
  bool takes_signals = true;
  std::size_t signals_refused = 0;
  std::vector<std::uint32_t> signals;
  std::deque<Completion> done;

  [[nodiscard]] std::string_view name() const override { return "instant"; }
  [[nodiscard]] std::uint8_t lanes() const override { return 0; }
  [[nodiscard]] std::size_t window(std::size_t /*queue_depth*/) const override { return 16384; }
  void attach(EventLoop& /*loop*/) override {}
  Bytes register_memory(RegionId /*region*/, MemoryRange /*range*/, MemoryUse /*use*/,
                        std::unique_ptr<PinnedMemory> /*pinned*/) override {
    return {};
  }
  std::unique_ptr<PinnedMemory> deregister_memory(RegionId /*region*/) override { return nullptr; }
  Bytes create_endpoint(PeerId /*peer*/) override { return {}; }
  void connect(PeerId /*peer*/, PeerLink /*link*/) override {}
  void probe(PeerId /*peer*/) override {}
  Posted post_writes(PeerId peer, TransferId transfer, std::span<const WriteSlice> slices,
                     std::optional<std::uint32_t> imm) override {
    EXPECT_FALSE(imm) << "would overtake the link";
    const std::size_t n = std::min(room, slices.size());
    if (n > 0) done.push_back({.peer = peer, .transfer = transfer, .slices = n});
    return {.slices = n};
  }
  bool post_signal(PeerId /*peer*/, std::uint32_t imm) override {
    if (!takes_signals) ++signals_refused;
    if (takes_signals) signals.push_back(imm);
    return takes_signals;
  }
  void close_peer(PeerId peer) override {
    std::erase_if(done, [peer](const Completion& one) { return one.peer == peer; });
  }
  bool progress(std::vector<Completion>& completions) override {
    if (!lands || done.empty()) return false;
    completions.insert(completions.end(), done.begin(), done.end());
    done.clear();
    return true;
  }
  void add_stats(Stats& /*stats*/) const override {}
};

/// What time it is for the backends of these tests.
Clock::time_point time_now;

/// A paced backend, turned by the test's thread at times of its own.
struct Paced {
  explicit Paced(const std::string& link, PacedBackend::Now now = [] { return time_now; }) {
    auto owned = std::make_unique<InstantBackend>();
    inner = owned.get();
    time_now = Clock::now();
    backend = std::make_unique<PacedBackend>(std::move(owned), parse_link(link), now);
    backend->attach(loop);
  }
  std::size_t write(TransferId transfer, std::size_t n, std::uint64_t nbytes, PeerId peer = kPeer,
                    std::optional<std::uint32_t> imm = {}) {
    const std::vector<WriteSlice> slices(n, WriteSlice{.nbytes = nbytes});
    const Posted posted = backend->post_writes(peer, transfer, slices, imm);
    EXPECT_FALSE(posted.signalled);
    return posted.slices;
  }
  void turn() {
    std::vector<Completion> completions;
    (void)backend->progress(completions);
    for (const Completion& one : completions) {
      others += one.kind == Completion::Kind::kWritesLanded ? 0 : 1;
      landed[one.peer] += one.slices;
      order.push_back(one.transfer);
    }
  }
  /// `microseconds` later.
  void turn_after(std::int64_t microseconds) {
    time_now += std::chrono::microseconds(microseconds);
    turn();
  }

  EventLoop loop;
  InstantBackend* inner = nullptr;
  std::unique_ptr<PacedBackend> backend;
  std::map<PeerId, std::size_t> landed;
  std::vector<TransferId> order;
  int others = 0;
};

TEST(Link, Parses) {
  const auto expect = [](const std::string& text, double rate, std::chrono::nanoseconds latency) {
    const Link link = parse_link(text);
    EXPECT_DOUBLE_EQ(link.bytes_per_s, rate) << text;
    EXPECT_EQ(link.latency, latency) << text;
    EXPECT_EQ(link.text, text);
  };
  expect("25GB/s", 25e9, {});
  expect("12.5GB/s+5us", 12.5e9, microseconds(5));
  expect("200MB/s+1ms", 2e8, milliseconds(1));
  expect("1500kB/s+250ns", 1.5e6, std::chrono::nanoseconds(250));
  expect("0.4TB/s+0.5s", 4e11, milliseconds(500));
  expect("1MB/s+0us", 1e6, {});
}

TEST(Link, RefusesWhatIsNoLink) {
  const auto error = [](const std::string& text) -> std::string {
    try {
      (void)parse_link(text);
    } catch (const std::invalid_argument& refused) {
      return refused.what();
    }
    return "";
  };
  for (const char* text : {"", "25", "25GB", "25 GB/s", "25Gb/s", "GB/s", "-1GB/s", "0GB/s",
                           "nanGB/s", "infGB/s", "1kB/s", "2000TB/s", "25GB/sx", "fast"}) {
    EXPECT_NE(error(text).find("link is '" + std::string(text) + "'; its rate must"),
              std::string::npos)
        << text;
  }
  for (const char* text : {"25GB/s+", "25GB/s+5", "25GB/s+-5us", "25GB/s+11s", "25GB/s+5us+5us"}) {
    EXPECT_NE(error(text).find("its latency must"), std::string::npos) << text;
  }
  EXPECT_NE(error("x").find("'12.5GB/s+5us'"), std::string::npos);
}

TEST(Paced, BytesTakeAsLongAsTheLinkDoes) {
  Paced paced("200MB/s");
  EXPECT_EQ(paced.write(1, 20, kMB), 20U);  // 5 ms each
  paced.turn_after(4999);
  EXPECT_EQ(paced.landed[kPeer], 0U);
  paced.turn_after(1);
  EXPECT_EQ(paced.landed[kPeer], 1U);
  paced.turn_after(94'999);
  EXPECT_EQ(paced.landed[kPeer], 19U);
  paced.turn_after(1);
  EXPECT_EQ(paced.landed[kPeer], 20U);
}

TEST(Paced, SmallSlicesKeepTheRateToo) {
  // 20.48 ns each: whole nanoseconds would make it 2 % faster.
  Paced paced("25GB/s");
  paced.write(1, 1'000'000, 512);
  paced.turn_after(20'479);
  EXPECT_LT(paced.landed[kPeer], 1'000'000U);
  EXPECT_GT(paced.landed[kPeer], 999'800U);
  paced.turn_after(1);
  EXPECT_EQ(paced.landed[kPeer], 1'000'000U);
}

/// A window of writes that is refilled as they land: no gaps add up.
TEST(Paced, AStreamKeepsTheLinkBusy) {
  constexpr std::size_t kSlices = 4000;
  constexpr std::uint64_t kSlice = 50'000;
  constexpr std::size_t kWindow = 64;
  Paced paced("1GB/s+100us");
  const auto start = time_now;
  for (std::size_t posted = 0; paced.landed[kPeer] < kSlices; paced.turn_after(3)) {
    const std::size_t room = kWindow - (posted - paced.landed[kPeer]);
    posted += paced.write(1, std::min(room, kSlices - posted), kSlice);
  }
  const auto took = std::chrono::duration_cast<microseconds>(time_now - start);
  EXPECT_GE(took, microseconds(200'100));
  EXPECT_LE(took, microseconds(200'110));
}

TEST(Paced, AnIdleLinkSavesNothingUp) {
  Paced paced("100MB/s");
  paced.turn_after(1'000'000);
  paced.write(1, 1, kMB);
  paced.turn_after(9'999);
  EXPECT_EQ(paced.landed[kPeer], 0U);
  paced.turn_after(1);
  EXPECT_EQ(paced.landed[kPeer], 1U);
}

TEST(Paced, LatencyIsAddedOnce) {
  Paced paced("100MB/s+80ms");
  paced.write(1, 2, kMB);
  paced.turn_after(89'999);
  EXPECT_EQ(paced.landed[kPeer], 0U);
  paced.turn_after(1);
  EXPECT_EQ(paced.landed[kPeer], 1U);
  paced.turn_after(10'000);
  EXPECT_EQ(paced.landed[kPeer], 2U);
}

TEST(Paced, PeersHaveLinksOfTheirOwn) {
  Paced paced("100MB/s");
  paced.write(1, 10, kMB);
  paced.write(2, 1, kMB, kOther);
  paced.turn_after(10'000);
  EXPECT_EQ(paced.landed[kPeer], 1U);
  EXPECT_EQ(paced.landed[kOther], 1U);
}

TEST(Paced, SignalsComeAfterTheWritesBeforeThem) {
  using Signals = std::vector<std::uint32_t>;
  Paced paced("100MB/s+20ms");
  paced.write(1, 2, kMB, kPeer, 7);  // its signal is not taken along, so it is posted by itself
  EXPECT_TRUE(paced.backend->post_signal(kPeer, 7));
  paced.write(2, 2, kMB);
  EXPECT_TRUE(paced.backend->post_signal(kPeer, 8));
  EXPECT_TRUE(paced.backend->post_signal(kPeer, 9));
  paced.turn_after(39'999);
  EXPECT_EQ(paced.inner->signals, Signals{});
  paced.turn_after(1);
  EXPECT_EQ(paced.inner->signals, Signals{7});
  EXPECT_EQ(paced.landed[kPeer], 2U);
  paced.turn_after(19'999);
  EXPECT_EQ(paced.inner->signals, Signals{7});
  paced.turn_after(1);
  EXPECT_EQ(paced.inner->signals, (Signals{7, 8, 9}));
  EXPECT_EQ(paced.order, (std::vector<TransferId>{1, 1, 2, 2}));
}

/// What the inner backend takes longer for than the link holds up what is behind it.
TEST(Paced, NothingIsReportedBeforeItIsThere) {
  Paced paced("1GB/s");
  paced.inner->lands = false;
  paced.write(1, 3, 1000);
  EXPECT_TRUE(paced.backend->post_signal(kPeer, 7));
  paced.turn_after(5000);
  EXPECT_EQ(paced.landed[kPeer], 0U);
  EXPECT_TRUE(paced.inner->signals.empty());
  EXPECT_TRUE(paced.backend->arm());  // The inner backend will wake the thread.
  paced.inner->lands = true;
  paced.turn();
  EXPECT_EQ(paced.landed[kPeer], 3U);
  EXPECT_EQ(paced.inner->signals, std::vector<std::uint32_t>{7});
}

TEST(Paced, RefusedSignalsAreOfferedAgain) {
  Paced paced("1GB/s");
  paced.inner->takes_signals = false;
  EXPECT_TRUE(paced.backend->post_signal(kPeer, 7));
  EXPECT_TRUE(paced.backend->post_signal(kPeer, 8));
  paced.turn();
  paced.turn();
  EXPECT_EQ(paced.inner->signals_refused, 2U);
  EXPECT_TRUE(paced.backend->arm());
  paced.inner->takes_signals = true;
  paced.turn();
  EXPECT_EQ(paced.inner->signals, (std::vector<std::uint32_t>{7, 8}));
}

TEST(Paced, APartialPostIsPacedAsFarAsItWent) {
  Paced paced("100MB/s");
  paced.inner->room = 2;
  EXPECT_EQ(paced.write(1, 5, kMB), 2U);
  paced.inner->room = 0;
  EXPECT_EQ(paced.write(1, 3, kMB), 0U);
  paced.inner->room = SIZE_MAX;
  paced.turn_after(20'000);
  EXPECT_EQ(paced.landed[kPeer], 2U);
  EXPECT_EQ(paced.write(1, 3, kMB), 3U);
  paced.turn_after(30'000);
  EXPECT_EQ(paced.landed[kPeer], 5U);
}

TEST(Paced, ClosedPeersLeaveNothing) {
  Paced paced("100MB/s");
  paced.write(1, 2, kMB);
  EXPECT_TRUE(paced.backend->post_signal(kPeer, 7));
  paced.write(2, 1, kMB, kOther);
  paced.turn();
  paced.backend->close_peer(kPeer);
  paced.turn_after(1'000'000);
  EXPECT_EQ(paced.landed[kPeer], 0U);
  EXPECT_EQ(paced.landed[kOther], 1U);
  EXPECT_TRUE(paced.inner->signals.empty());
  paced.backend->close_peer(99);
}

TEST(Paced, OtherCompletionsPassAtOnce) {
  Paced paced("1MB/s");
  paced.write(1, 1, kMB);
  paced.inner->done.push_back({.kind = Completion::Kind::kImm, .peer = kPeer, .imm = 3});
  paced.inner->done.push_back({.kind = Completion::Kind::kReachable, .peer = kOther});
  paced.inner->done.push_back({.kind = Completion::Kind::kPeerError, .peer = kPeer});
  paced.turn();
  EXPECT_EQ(paced.others, 3);
}

TEST(Paced, PollsForShortWaitsOnly) {
  Paced paced("100MB/s");
  EXPECT_TRUE(paced.backend->arm());
  paced.write(1, 1, kMB);  // 10 ms
  EXPECT_TRUE(paced.backend->arm());
  paced.turn_after(8900);
  EXPECT_TRUE(paced.backend->arm());
  paced.turn_after(200);
  EXPECT_FALSE(paced.backend->arm());
  // Due between two turns: the next one must come at once.
  time_now += milliseconds(5);
  EXPECT_FALSE(paced.backend->arm());
  paced.turn();
  EXPECT_EQ(paced.landed[kPeer], 1U);
  EXPECT_TRUE(paced.backend->arm());
}

/// The timer wakes the thread shortly before what is due.
TEST(Paced, SleepsThroughLongWaits) {
  Paced paced("100MB/s", &Clock::now);
  Turn mutex;
  std::unique_lock turn(mutex);
  const auto start = Clock::now();
  paced.write(1, 1, 3 * kMB);  // 30 ms
  ASSERT_TRUE(paced.backend->arm());
  EXPECT_TRUE(paced.loop.run_once(std::chrono::seconds(20), turn).handlers);
  EXPECT_GE(Clock::now() - start, milliseconds(29));
  EXPECT_LT(Clock::now() - start, engine_patience() / 2);
}

/// A caller that posts while the thread sleeps leaves the thread a timer.
TEST(Paced, WakesForWhatIsPostedDuringTheSleep) {
  Paced paced("100MB/s", &Clock::now);
  Turn mutex;
  std::unique_lock turn(mutex);
  const auto start = Clock::now();
  ASSERT_TRUE(paced.backend->arm());
  paced.write(1, 1, 2 * kMB);
  paced.turn();
  EXPECT_TRUE(paced.loop.run_once(std::chrono::seconds(20), turn).handlers);
  EXPECT_LT(Clock::now() - start, engine_patience() / 2);
}

/// Else the window refills by single slices, and what posting those takes slows the link.
TEST(Paced, LeavesTheWindowAsItIs) { EXPECT_EQ(Paced("25GB/s").backend->window(1024), 16384U); }

TEST(Paced, NamesTheLink) {
  Paced paced("25GB/s");
  EXPECT_EQ(paced.backend->describe(), "paced link 25GB/s: instant");
  EXPECT_EQ(paced.backend->name(), "instant");
}

TEST(PacedEngine, IsWhatTheConfigurationAsksFor) {
  const auto backend = create_backend({.backend = "tcp", .link = "25GB/s+5us"});
  EXPECT_TRUE(backend->describe().starts_with("paced link 25GB/s+5us: tcp"));
  EXPECT_THROW((void)create_backend({.backend = "tcp", .link = "fast"}), std::invalid_argument);
}

class TcpNetwork final : public Network {
 public:
  std::unique_ptr<Backend> create_backend(std::size_t /*engine*/,
                                          const EngineConfig& config) override {
    return rkv::create_backend(config);
  }
};

/// 16 MiB over real sockets at 200 MB/s: the transfer and its signal take what the link takes.
TEST(PacedEngine, PacesRealSockets) {
  constexpr std::size_t kBytes = 16 << 20;
  TcpNetwork network;
  const EngineConfig config{.backend = "tcp", .link = "200MB/s+2ms"};
  Side a(1, config, network, kBytes);
  Side b(2, config, network, kBytes);
  connect_both(a, b);
  std::mt19937_64 random(1);
  fill_random(a.buffer, random);
  const auto start = Clock::now();
  const Columns rows = scattered_pages(a, b, 64 << 10, random);
  rows.write(a, 5);
  EXPECT_EQ(b.expect(EventKind::kImm).imm, 5U);
  const double until_imm = std::chrono::duration<double>(Clock::now() - start).count();
  EXPECT_GE(until_imm, 0.0838);
  // Each of 256 pages waits for a timer, none for the next tick.
  EXPECT_LT(until_imm, 5);
  expect_landed(rows);
  a.expect(EventKind::kTransferDone);
}

/// Held writes fail with the peer, and the engine closes cleanly over them.
TEST(PacedEngine, ClosesWhileWritesAreHeld) {
  constexpr std::size_t kBytes = 4 << 20;
  TcpNetwork network;
  const EngineConfig config{.backend = "tcp", .link = "1MB/s"};
  Side a(1, config, network, kBytes);
  Side b(2, config, network, kBytes);
  connect_both(a, b);
  std::mt19937_64 random(1);
  scattered_pages(a, b, 64 << 10, random).write(a, 5);
  b.engine.close_peer(b.endpoint.peer);
  EXPECT_EQ(a.expect(EventKind::kTransferFailed).id, 1U);
  a.expect(EventKind::kPeerLost);
  EXPECT_EQ(a.seen[EventKind::kTransferDone], 0);
}

}  // namespace
}  // namespace rkv::paced
