// SPDX-License-Identifier: Apache-2.0
/// What a host with devices of a fake fabric looks like to the verbs backend.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fake_rdma.h"
#include "verbs/device_choice.h"

namespace rkv::verbs {

/// `n` devices rxe0, rxe1, ... like `device`. Their IPv4 addresses are of TEST-NET-1 (RFC 5737),
/// which no netdev of this host has: subnets are not known.
inline std::vector<FakeDeviceOptions> fake_devices(std::size_t n, FakeDeviceOptions device = {}) {
  std::vector<FakeDeviceOptions> devices;
  for (std::size_t i = 0; i < n; ++i) {
    ibv_gid gid{};
    gid.raw[10] = gid.raw[11] = 0xff;
    gid.raw[12] = 192;
    gid.raw[14] = 2;
    gid.raw[15] = static_cast<std::uint8_t>(i + 1);
    device.name = "rxe" + std::to_string(i);
    device.gids = {gid};
    devices.push_back(device);
  }
  return devices;
}

/// A fabric of `n` such devices.
inline FakeOptions fake_fabric(std::size_t n, FakeOptions options = {},
                               const FakeDeviceOptions& device = {}) {
  options.devices = fake_devices(n, device);
  return options;
}

/// What choose_ports() says of these devices.
inline Choice choose_fakes(const FakeFabric& fabric, const std::vector<std::string>& devices,
                           LinkLayer link_layer = LinkLayer::kEthernet) {
  const bool roce = link_layer == LinkLayer::kEthernet;
  Choice choice;
  for (const std::string& device : devices) {
    ChosenPort chosen;
    chosen.port.device = device;
    chosen.port.state = "ACTIVE";
    chosen.port.link_layer = link_layer;
    chosen.port.rate_gbps = 100;
    const ibv_gid gid = fabric.gid(device, 0);
    std::copy(std::begin(gid.raw), std::end(gid.raw), chosen.gid.raw.begin());
    chosen.gid.type = roce ? Gid::Type::kRoceV2 : Gid::Type::kIb;
    choice.ports.push_back(std::move(chosen));
  }
  return choice;
}

/// A fabric whose backends, which are gone, must have left nothing behind. QPs that take long to
/// destroy outlive their backend for a while.
class CleanFabric : public FakeFabric {
 public:
  using FakeFabric::FakeFabric;
  ~CleanFabric() { expect_clean(); }

  void expect_clean() const {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (live_objects() > 0 && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(live_objects(), 0U);
    EXPECT_FALSE(overflowed());
  }
};

}  // namespace rkv::verbs
