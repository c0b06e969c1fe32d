// SPDX-License-Identifier: Apache-2.0
/// The engines' suite over the verbs backend on fake fabrics.
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
  void expect_clean() const override { verbs::expect_clean(fabric_); }

 private:
  verbs::FakeFabric fabric_;
  verbs::LinkLayer link_layer_;
  std::array<std::vector<std::string>, 2> devices_;
};

struct FakeConfig {
  std::string name;
  EngineConfig config = {};
  FakeOptions options = {};
  std::array<std::size_t, 2> rails = {1, 1};
  FakeDeviceOptions device = {};
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
       }) {
    const FakeOptions options =
        verbs::fake_fabric(row.rails[0] + row.rails[1], row.options, row.device);
    params.push_back({row.name, row.config, [options, rails = row.rails] {
                        return std::make_unique<FakeNetwork>(options, rails);
                      }});
  }
  return params;
}

INSTANTIATE_TEST_SUITE_P(FakeVerbs, EngineTest, testing::ValuesIn(fake_configs()), name_of);

}  // namespace
}  // namespace rkv
