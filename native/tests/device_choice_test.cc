// SPDX-License-Identifier: Apache-2.0
#include "verbs/device_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>

#include "sysfs_tree.h"

namespace rkv::verbs {
namespace {

using Names = std::vector<std::string>;

Names names(const Choice& choice) {
  Names all;
  for (const ChosenPort& chosen : choice.ports) all.push_back(chosen.port.name());
  return all;
}

Names near(const Host& host, const std::string& place) {
  return names(choose_ports(host, {.near = place}));
}

std::string refusal(const Host& host, const ChoiceRequest& request) {
  try {
    (void)choose_ports(host, request);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

bool rejects(const Choice& choice, const std::string& reason) {
  return std::ranges::find(choice.rejected, reason) != choice.rejected.end();
}

Port& port_of(Host& host, const std::string& device) {
  return *std::ranges::find(host.ports, device, &Port::device);
}

const Gid& gid_of(const Choice& choice) { return choice.ports.at(0).gid; }

TEST(DistanceBetween, IsThatOfNvidiaSmi) {
  const Host a100 = read_tree("hgx_a100");
  const Host h100 = read_tree("dgx_h100");
  const Host desk = read_tree("workstation_roce");
  const auto between = [](const Host& host, const char* a, const char* b) {
    return distance(host.pci.at(a), host.pci.at(b));
  };
  EXPECT_EQ(between(h100, "0000:1b:00.0", "0000:18:00.0"), Distance::kPix);
  EXPECT_EQ(between(desk, "0000:01:00.0", "0000:01:00.1"), Distance::kPix);
  EXPECT_EQ(between(desk, "0000:01:00.0", "0000:01:00.0"), Distance::kPix);
  EXPECT_EQ(between(a100, "0000:07:00.0", "0000:0c:00.0"), Distance::kPxb);
  EXPECT_EQ(between(a100, "0000:0f:00.0", "0000:0c:00.0"), Distance::kPxb);
  EXPECT_EQ(between(desk, "0000:0a:00.0", "0000:01:00.0"), Distance::kPhb);
  EXPECT_EQ(between(h100, "0000:1b:00.0", "0000:40:00.0"), Distance::kNode);
  EXPECT_EQ(between(h100, "0000:1b:00.0", "0000:9a:00.0"), Distance::kSys);
  EXPECT_EQ(distance(a100.pci.at("0000:07:00.0"), {}), Distance::kUnknown);
  // One more bridge on one side only.
  const PciDevice near{.path = {"pci0000:00", "0000:00:01.0", "0000:01:00.0", "0000:02:00.0"}};
  const PciDevice beyond{
      .path = {"pci0000:00", "0000:00:01.0", "0000:01:01.0", "0000:03:00.0", "0000:04:00.0"}};
  EXPECT_EQ(distance(near, beyond), Distance::kPxb);
}

/// Two GPUs share two NICs at PXB: each takes one.
TEST(ChoosePorts, EveryGpuOfHgxA100HasItsNic) {
  const Host host = read_tree("hgx_a100");
  const std::vector<std::pair<const char*, const char*>> expected{
      {"0000:07:00.0", "mlx5_0:1"}, {"0000:0f:00.0", "mlx5_1:1"}, {"0000:47:00.0", "mlx5_2:1"},
      {"0000:4e:00.0", "mlx5_3:1"}, {"0000:87:00.0", "mlx5_5:1"}, {"0000:90:00.0", "mlx5_6:1"},
      {"0000:b7:00.0", "mlx5_7:1"}, {"0000:bd:00.0", "mlx5_8:1"}};
  for (const auto& [gpu, nic] : expected) {
    EXPECT_EQ(near(host, std::string("pci:") + gpu), Names{nic}) << gpu;
  }
}

TEST(ChoosePorts, EveryGpuOfDgxH100HasItsNic) {
  const Host host = read_tree("dgx_h100");
  const std::vector<std::pair<const char*, const char*>> expected{
      {"0000:1b:00.0", "mlx5_0:1"},  {"0000:43:00.0", "mlx5_3:1"}, {"0000:52:00.0", "mlx5_4:1"},
      {"0000:61:00.0", "mlx5_5:1"},  {"0000:9d:00.0", "mlx5_6:1"}, {"0000:c3:00.0", "mlx5_9:1"},
      {"0000:d1:00.0", "mlx5_10:1"}, {"0000:df:00.0", "mlx5_11:1"}};
  for (const auto& [gpu, nic] : expected) {
    EXPECT_EQ(near(host, std::string("pci:") + gpu), Names{nic}) << gpu;
  }
}

TEST(ChoosePorts, SaysWhatAndWhy) {
  const Choice choice = choose_ports(read_tree("hgx_a100"), {.near = "pci:0000:07:00.0"});
  EXPECT_EQ(gid_of(choice).index, 0);
  const std::string text = choice.text();
  EXPECT_TRUE(has(text,
                  "mlx5_0:1 (InfiniBand, 200 Gb/s, 0000:0c:00.0, NUMA node 3): PXB from "
                  "0000:07:00.0; LID 16, GID 0 = fe80::b83f:d203:a1:4200 (IB)\n"))
      << text;
  EXPECT_TRUE(has(text, "not used: mlx5_4:1 is slow: 25 Gb/s, and mlx5_0:1 has 200 Gb/s\n"))
      << text;
  EXPECT_TRUE(text.ends_with("\nnot used: mlx5_1:1 is as near, and left to others")) << text;
  EXPECT_TRUE(has(text, "not used: mlx5_2:1 is farther: SYS from 0000:07:00.0\n")) << text;
}

TEST(ChoosePorts, OneGpuTakesAllNicsOfItsSwitch) {
  Host host = read_tree("hgx_a100");
  host.pci.erase("0000:0f:00.0");
  EXPECT_EQ(near(host, "pci:0000:07:00.0"), (Names{"mlx5_0:1", "mlx5_1:1"}));
}

TEST(ChoosePorts, NeighbourTakesOverForPortThatIsDown) {
  Host host = read_tree("hgx_a100");
  port_of(host, "mlx5_0").state = "DOWN";
  const Choice choice = choose_ports(host, {.near = "pci:0000:07:00.0"});
  EXPECT_EQ(names(choice), Names{"mlx5_1:1"});
  EXPECT_TRUE(rejects(choice, "mlx5_0:1 is DOWN"));
  EXPECT_EQ(near(host, "pci:0000:0f:00.0"), Names{"mlx5_1:1"});
}

/// Beyond a host bridge one NIC is taken.
TEST(ChoosePorts, GpusFarFromAllNicsTakeTurns) {
  Host host = read_tree("dgx_h100");
  for (const char* device : {"mlx5_0", "mlx5_3"}) port_of(host, device).state = "DOWN";
  EXPECT_EQ(near(host, "pci:0000:1b:00.0"), Names{"mlx5_4:1"});
  EXPECT_EQ(near(host, "pci:0000:43:00.0"), Names{"mlx5_5:1"});
}

TEST(ChoosePorts, HostMemoryTakesAllNicsOfItsNode) {
  const Host host = read_tree("dgx_h100");
  const Choice choice = choose_ports(host, {.near = "numa:1"});
  EXPECT_EQ(names(choice), (Names{"mlx5_6:1", "mlx5_9:1", "mlx5_10:1", "mlx5_11:1"}));
  EXPECT_TRUE(rejects(choice, "mlx5_7:1 is not like mlx5_6:1: 200 Gb/s Ethernet"));
  EXPECT_TRUE(rejects(choice, "mlx5_0:1 is farther: SYS from NUMA node 1"));
  EXPECT_EQ(near(host, "numa:7").size(), 1U);  // none is on it
}

TEST(ChoosePorts, UnknownPlaceTakesOne) {
  EXPECT_EQ(near(read_tree("dgx_h100"), ""), Names{"mlx5_0:1"});
  Host container = read_tree("dgx_h100");
  container.pci.clear();
  EXPECT_EQ(near(container, "pci:0000:1b:00.0"), Names{"mlx5_0:1"});
}

TEST(ChoosePorts, WorkstationGpu) {
  const Choice choice = choose_ports(read_tree("workstation_roce"), {.near = "pci:0000:0A:00.0"});
  EXPECT_EQ(names(choice), Names{"mlx5_0:1"});
  EXPECT_EQ(choice.ports[0].why,
            "PHB from 0000:0a:00.0; GID 3 = ::ffff:192.168.7.2 (RoCE v2, enp1s0f0np0)");
}

TEST(ChoosePorts, GpuBeyondTheHostBridgeTakesOne) {
  Host host = read_tree("workstation_roce");
  Port& second = port_of(host, "mlx5_1");
  second.state = "ACTIVE";
  second.rate_gbps = 100;
  for (Gid& gid : second.gids) gid.netdev_down = false;
  EXPECT_EQ(near(host, "pci:0000:0a:00.0"), Names{"mlx5_0:1"});
}

TEST(ChoosePorts, SoftwareDeviceOnlyWithoutHardware) {
  const Host guest = read_tree("soft_roce");
  EXPECT_EQ(near(guest, "numa:0"), Names{"rxe0:1"});
  EXPECT_EQ(names(choose_ports(guest, {.devices = "rxe1,rxe0"})), (Names{"rxe1:1", "rxe0:1"}));
  Host mixed = read_tree("workstation_roce");
  mixed.ports.insert(mixed.ports.begin(), guest.ports[0]);
  mixed.ports[0].rate_gbps = 100;
  const Choice choice = choose_ports(mixed, {});
  EXPECT_EQ(names(choice), Names{"mlx5_0:1"});
  EXPECT_TRUE(rejects(choice, "rxe0:1 is a software device"));
}

TEST(ChoosePorts, NamedPortsInTheirOrderWhereverTheyAre) {
  const Host host = read_tree("hgx_a100");
  const Choice choice = choose_ports(host, {.devices = "mlx5_4,mlx5_0:1", .near = "numa:1"});
  EXPECT_EQ(names(choice), (Names{"mlx5_4:1", "mlx5_0:1"}));
  EXPECT_TRUE(has(choice.ports[0].why, "named in devices, SYS from NUMA node 1; GID 3"))
      << choice.text();
}

TEST(ChoosePorts, RefusesNamesThatCannotBeUsed) {
  const Host host = read_tree("dgx_h100");
  EXPECT_TRUE(has(refusal(host, {.devices = "mlx5_99"}),
                  "devices names 'mlx5_99', but this host has mlx5_0:1, mlx5_1:1"));
  EXPECT_TRUE(has(refusal(host, {.devices = "mlx5_0:2"}), "devices names 'mlx5_0:2'"));
  EXPECT_TRUE(has(refusal(host, {.devices = "mlx5_0,"}), "devices names ''"));
  EXPECT_TRUE(has(refusal(host, {.devices = "mlx5_0,mlx5_2"}), "mlx5_2:1 is DOWN"));
  EXPECT_TRUE(has(refusal(host, {.devices = "mlx5_0,mlx5_0:1"}), "names mlx5_0:1 twice"));
}

TEST(ChoosePorts, RefusesHostWithoutUsablePort) {
  EXPECT_TRUE(has(refusal(read_tree("nothing"), {}), "no RDMA device"));
  Host host = read_tree("roce_bond");
  port_of(host, "mlx5_bond_0").state = "DOWN";
  const std::string text = refusal(host, {});
  EXPECT_TRUE(has(text, "mlx5_bond_0:1 is DOWN")) << text;
  EXPECT_TRUE(has(text, "mlx5_2:1 is INIT (no subnet manager has configured it)")) << text;
  EXPECT_TRUE(has(text, "set backend to 'tcp'")) << text;
}

TEST(ChoosePorts, RefusesIwarp) {
  Host host = read_tree("soft_roce");
  port_of(host, "rxe0").node_type = "RNIC";
  const Choice choice = choose_ports(host, {});
  EXPECT_EQ(names(choice), Names{"rxe1:1"});
  EXPECT_TRUE(has(choice.rejected.at(0), "rxe0:1 is of node type RNIC"));
}

TEST(ChoosePorts, RefusesPlacesThatAreNone) {
  const Host host = read_tree("hgx_a100");
  for (const char* place : {"pci:0000:99:00.0", "pci:", "numa:", "numa:x", "numa:-1", "gpu:0"}) {
    EXPECT_TRUE(has(refusal(host, {.near = place}), std::string("near is '") + place)) << place;
  }
}

TEST(ChooseGid, PrefersRoutedAddressesWithoutVlan) {
  Host host = read_tree("roce_bond");
  std::vector<Gid>& gids = port_of(host, "mlx5_bond_0").gids;
  const auto best = [&] { return gid_of(choose_ports(host, {})).index; };
  const auto drop = [&](int index) {
    std::erase_if(gids, [&](const Gid& g) { return g.index == index; });
  };
  EXPECT_EQ(best(), 9);  // RoCE v2, IPv4, no VLAN
  drop(9);
  EXPECT_EQ(best(), 5);  // RoCE v2, IPv4, on a VLAN
  drop(5), drop(7);
  EXPECT_EQ(best(), 11);  // RoCE v2, global IPv6
  drop(11);
  EXPECT_EQ(best(), 1);  // RoCE v2, link-local, no VLAN
  drop(1), drop(3);
  EXPECT_EQ(best(), 0);  // RoCE v1
}

TEST(ChooseGid, NeverOfNetdevThatIsDown) {
  Host host = read_tree("workstation_roce");
  Port& port = port_of(host, "mlx5_0");
  for (Gid& gid : port.gids) gid.netdev_down = gid.index != 1;
  EXPECT_EQ(gid_of(choose_ports(host, {})).index, 1);
  port.gids[1].netdev_down = true;
  EXPECT_TRUE(has(refusal(host, {}), "mlx5_0:1 has no usable GID")) << refusal(host, {});
}

TEST(ChooseGid, TakesIndexAsked) {
  const Host host = read_tree("workstation_roce");
  EXPECT_EQ(gid_of(choose_ports(host, {.gid_index = 1})).index, 1);
}

TEST(ChooseGid, RefusesIndexThatCannotBeUsed) {
  Host host = read_tree("workstation_roce");
  const auto text = [&](int index) { return refusal(host, {.gid_index = index}); };
  EXPECT_TRUE(has(text(6), "mlx5_0:1 has no GID 6 in its 6 slots")) << text(6);
  EXPECT_TRUE(has(text(4), "mlx5_0:1 has an empty GID 4")) << text(4);
  EXPECT_TRUE(has(text(4), "3 = ::ffff:192.168.7.2 (RoCE v2, enp1s0f0np0)")) << text(4);
  port_of(host, "mlx5_0").gids[3].netdev_down = true;
  EXPECT_TRUE(has(text(3), "has GID 3 on enp1s0f0np0, which is down")) << text(3);
}

}  // namespace
}  // namespace rkv::verbs
