// SPDX-License-Identifier: Apache-2.0
/// The engines' suite over the verbs backend on fake fabrics.
#include <atomic>
#include <thread>

#include "engine_pair.h"
#include "fake_network.h"
#include "verbs/verbs_backend.h"

namespace rkv {
namespace {

using verbs::FakeDelivery;
using verbs::FakeDeviceOptions;
using verbs::FakeOptions;

/// Every engine has devices of its own.
class FakeNetwork final : public Network {
 public:
  FakeNetwork(const FakeOptions& options, const std::array<std::size_t, 2>& rails)
      : fabric_(options),
        link_layer_(options.devices.front().link_layer == IBV_LINK_LAYER_INFINIBAND
                        ? verbs::LinkLayer::kInfiniBand
                        : verbs::LinkLayer::kEthernet) {
    for (std::size_t device = 0; device < options.devices.size(); ++device) {
      devices_[device < rails[0] ? 0 : 1].push_back(options.devices[device].name);
    }
  }

  std::unique_ptr<Backend> create_backend(std::size_t engine, const EngineConfig& config) override {
    return std::make_unique<verbs::VerbsBackend>(
        config, verbs::FakeFabric::table(),
        verbs::choose_fakes(fabric_, devices_[engine], link_layer_));
  }
  void expect_clean() const override { fabric_.expect_clean(); }
  [[nodiscard]] verbs::FakeFabric& fabric() { return fabric_; }

 private:
  verbs::CleanFabric fabric_;
  verbs::LinkLayer link_layer_;
  std::array<std::vector<std::string>, 2> devices_;
};

struct FakeConfig {
  std::string name;
  EngineConfig config = {};
  FakeOptions options = {};
  std::array<std::size_t, 2> rails = {1, 1};
  FakeDeviceOptions device = {};
  bool routed = false;  ///< Every device is in an InfiniBand subnet of its own.
};

std::vector<EngineParam> fake_configs() {
  const auto deferred = [](std::uint64_t seed) {
    return FakeOptions{.delivery = FakeDelivery::kDeferred, .seed = seed};
  };
  const FakeDeviceOptions tiny{.max_qp_wr = 16, .max_cqe = 64, .max_srq_wr = 128};
  std::vector<EngineParam> params;
  for (const FakeConfig& row : std::vector<FakeConfig>{
           {.name = "synchronous", .config = {.qps_per_peer = 1}},
           {.name = "synchronous_four_qps", .config = {.qps_per_peer = 4, .spin_us = 0}},
           {.name = "deferred_1", .options = deferred(1)},
           {.name = "deferred_2", .config = {.qps_per_peer = 4}, .options = deferred(2)},
           {.name = "deferred_3", .config = {.spin_us = 0}, .options = deferred(3)},
           {.name = "two_rails",
            .config = {.qps_per_peer = 4},
            .options = deferred(4),
            .rails = {2, 2}},
           {.name = "one_rail_to_two", .options = deferred(5), .rails = {1, 2}},
           {.name = "small_blocks",
            .config = {.block_size = 4096, .queue_depth = 3},
            .options = deferred(6)},
           {.name = "tiny_device", .config = {.qps_per_peer = 4}, .device = tiny},
           {.name = "tiny_device_deferred", .options = deferred(7), .device = tiny},
           {.name = "infiniband",
            .options = deferred(8),
            .device = {.link_layer = IBV_LINK_LAYER_INFINIBAND}},
           {.name = "infiniband_routed",
            .options = deferred(9),
            .device = {.link_layer = IBV_LINK_LAYER_INFINIBAND},
            .routed = true},
       }) {
    FakeOptions options = verbs::fake_fabric(row.rails[0] + row.rails[1], row.options, row.device);
    for (std::uint8_t i = 0; row.routed && i < options.devices.size(); ++i) {
      options.devices[i].gids[0].raw[7] = i;  // the end of the subnet prefix
    }
    params.push_back({row.name, row.config, [options, rails = row.rails] {
                        return std::make_unique<FakeNetwork>(options, rails);
                      }});
  }
  return params;
}

INSTANTIATE_TEST_SUITE_P(FakeVerbs, EngineTest, testing::ValuesIn(fake_configs()), name_of);

/// Two engines over verbs whose control connection outlives what happens to the fabric.
class VerbsEngineFault : public testing::Test {
 protected:
  void connect() {
    connect_both(a_, b_);
    rows_.local = {static_cast<std::int64_t>(a_.address(0))};
    rows_.remote = {static_cast<std::int64_t>(b_.address(0))};
    rows_.nbytes = {static_cast<std::int64_t>(a_.buffer.size())};
  }
  void expect_lost(const std::vector<std::string>& words) {
    const Event lost = a_.expect(EventKind::kPeerLost);
    for (const std::string& word : words) {
      EXPECT_NE(lost.reason.find(word), std::string::npos) << word << ": " << lost.reason;
    }
    EXPECT_THROW((void)rows_.write(a_), std::runtime_error);
  }

  FakeNetwork network_{verbs::fake_fabric(2), {1, 1}};
  Side a_{1, {.block_size = 65536, .peer_timeout_s = 1.0}, network_, 1 << 20};
  Side b_{2, {.peer_timeout_s = 3.0}, network_, 1 << 20};  // is not the first to notice
  Columns rows_;
};

TEST_F(VerbsEngineFault, DeadPeerEndsEveryWriteExactlyOnce) {
  connect();
  std::map<TransferId, int> ends{{rows_.write(a_), 0}};
  EXPECT_EQ(a_.expect(EventKind::kTransferDone).id, ends.begin()->first);
  network_.fabric().drop_all_from("rxe1");
  for (int i = 0; i < 20; ++i) ends[rows_.write(a_)] = 0;
  for (std::size_t i = 1; i < ends.size(); ++i) ++ends[a_.expect(EventKind::kTransferFailed).id];
  expect_lost({"peer peer-of-1: rxe0:1 QP", "retry counter exceeded"});
  EXPECT_EQ(ends.size(), 21U);  // no id that was not given out
  for (const auto& [id, times] : ends) EXPECT_EQ(times, id == ends.begin()->first ? 0 : 1) << id;
  EXPECT_EQ(a_.seen[EventKind::kTransferDone], 1);
  EXPECT_EQ(a_.seen[EventKind::kTransferFailed], 20);
}

TEST_F(VerbsEngineFault, IdlePeerIsFoundDeadByItsHeartbeats) {
  connect();
  network_.fabric().drop_all_from("rxe1");
  expect_lost({"keep-alive", "retry counter exceeded"});
}

TEST_F(VerbsEngineFault, StalledDeviceIsFoundByItsHeartbeats) {
  connect();
  network_.fabric().stall("rxe0");
  (void)rows_.write(a_);
  a_.expect(EventKind::kTransferFailed);
  expect_lost({"stalled"});
}

TEST_F(VerbsEngineFault, UnreachablePeerNeverConnects) {
  network_.fabric().drop_all_from("rxe1");
  a_.connect(b_);
  b_.connect(a_);
  expect_lost({"retry counter exceeded"});
  EXPECT_EQ(a_.seen[EventKind::kConnected], 0);
}

/// Heartbeats are the progress thread's, and it needs the turn for them.
TEST_F(VerbsEngineFault, BusyPollersStarveNoHeartbeat) {
  connect();
  std::atomic<bool> stop = false;
  std::vector<std::thread> pollers;
  for (Engine* engine : {&a_.engine, &a_.engine, &b_.engine}) {
    pollers.emplace_back([&stop, engine] {
      while (!stop) EXPECT_TRUE(engine->poll(1).empty());
    });
  }
  std::this_thread::sleep_for(std::chrono::seconds(2));  // twice a_'s peer_timeout_s
  stop = true;
  for (std::thread& poller : pollers) poller.join();
  EXPECT_EQ(std::get<std::uint64_t>(a_.engine.stats().at("peers_lost")), 0U);
}

}  // namespace
}  // namespace rkv
