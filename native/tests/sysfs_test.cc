// SPDX-License-Identifier: Apache-2.0
#include "verbs/sysfs.h"

#include <gtest/gtest.h>

#include "sysfs_tree.h"

namespace rkv::verbs {
namespace {

std::vector<std::string> names(const Host& host) {
  std::vector<std::string> all;
  for (const Port& port : host.ports) all.push_back(port.name());
  return all;
}

TEST(ReadHost, HgxA100) {
  const Host host = read_tree("hgx_a100");
  ASSERT_EQ(host.ports.size(), 9U);
  const Port& port = host.ports[0];
  EXPECT_EQ(port.name(), "mlx5_0:1");
  EXPECT_EQ(port.node_type, "CA");
  EXPECT_EQ(port.state, "ACTIVE");
  EXPECT_EQ(port.link_layer, LinkLayer::kInfiniBand);
  EXPECT_EQ(port.lid, 0x10);
  EXPECT_EQ(port.rate_gbps, 200);
  EXPECT_EQ(port.pci_address(), "0000:0c:00.0");
  EXPECT_EQ(port.pci.path, (PciPath{"pci0000:00", "0000:00:01.1", "0000:01:00.0", "0000:02:04.0",
                                    "0000:0a:00.0", "0000:0b:00.0", "0000:0c:00.0"}));
  EXPECT_EQ(port.pci.numa_node, 3);
  EXPECT_EQ(port.pci.pci_class, "0x020700");
  EXPECT_EQ(port.local_cpus, "48-63,176-191");
  EXPECT_EQ(port.gid_slots, 2);
  ASSERT_EQ(port.gids.size(), 1U);
  EXPECT_EQ(port.gids[0].type, Gid::Type::kIb);
  EXPECT_EQ(port.gids[0].text(), "fe80::b83f:d203:a1:4200 (IB)");
  EXPECT_EQ(host.pci.at("0000:07:00.0").pci_class, "0x030200");
  EXPECT_EQ(host.pci.at("0000:07:00.0").path.back(), "0000:07:00.0");
}

TEST(ReadHost, OrdersDevicesByNumber) {
  EXPECT_EQ(names(read_tree("dgx_h100")),
            (std::vector<std::string>{"mlx5_0:1", "mlx5_1:1", "mlx5_2:1", "mlx5_3:1", "mlx5_4:1",
                                      "mlx5_5:1", "mlx5_6:1", "mlx5_7:1", "mlx5_8:1", "mlx5_9:1",
                                      "mlx5_10:1", "mlx5_11:1"}));
}

TEST(ReadHost, RoceGids) {
  const Host host = read_tree("workstation_roce");
  ASSERT_EQ(names(host), (std::vector<std::string>{"mlx5_0:1", "mlx5_1:1"}));
  const Port& port = host.ports[0];
  EXPECT_EQ(port.pci.numa_node, -1);
  EXPECT_EQ(port.lid, 0);
  EXPECT_EQ(port.gid_slots, 6);
  ASSERT_EQ(port.gids.size(), 4U);  // not the empty slots, whose type cannot be read
  EXPECT_EQ(port.gids[0].text(), "fe80::e42:a1ff:fe1d:d12a (RoCE v1, enp1s0f0np0)");
  EXPECT_TRUE(port.gids[0].link_local());
  EXPECT_FALSE(port.gids[0].ipv4_mapped());
  EXPECT_EQ(port.gids[3].index, 3);
  EXPECT_EQ(port.gids[3].text(), "::ffff:192.168.7.2 (RoCE v2, enp1s0f0np0)");
  EXPECT_TRUE(port.gids[3].ipv4_mapped());
  EXPECT_FALSE(port.gids[3].link_local());
  EXPECT_EQ(host.ports[1].state, "DOWN");
  EXPECT_TRUE(host.ports[1].gids.at(0).netdev_down);
}

TEST(ReadHost, BondAndVlans) {
  const Host host = read_tree("roce_bond");
  ASSERT_EQ(names(host), (std::vector<std::string>{"mlx5_2:1", "mlx5_bond_0:1"}));
  EXPECT_EQ(host.ports[0].state, "INIT");
  EXPECT_EQ(host.ports[0].lid, 0xffff);
  const std::vector<Gid>& gids = host.ports[1].gids;
  ASSERT_EQ(gids.size(), 12U);
  EXPECT_FALSE(gids[0].vlan);
  EXPECT_EQ(gids[5].text(), "::ffff:10.100.0.5 (RoCE v2, bond0.100, VLAN)");
  EXPECT_EQ(gids[7].text(), "::ffff:10.200.0.5 (RoCE v2, storage, VLAN)");
}

TEST(ReadHost, SoftRoceHasNoPlace) {
  const Host host = read_tree("soft_roce");
  ASSERT_EQ(names(host), (std::vector<std::string>{"rxe0:1", "rxe1:1"}));
  EXPECT_EQ(host.ports[0].pci_address(), "");
  EXPECT_EQ(host.ports[0].pci.numa_node, -1);
  EXPECT_EQ(host.ports[0].local_cpus, "");
  EXPECT_EQ(host.ports[0].rate_gbps, 2.5);
  ASSERT_EQ(host.ports[0].gids.size(), 2U);
  EXPECT_EQ(host.ports[0].gids[1].text(), "::ffff:10.77.0.1 (RoCE v2, eth0)");
  EXPECT_FALSE(host.ports[0].gids[1].netdev_down);  // operstate of a dummy netdev is "unknown"
}

TEST(ReadHost, NothingThere) {
  EXPECT_TRUE(read_tree("nothing").ports.empty());
  EXPECT_TRUE(read_host("/nonexistent").ports.empty());
}

/// A container may show a port without most of its files.
TEST(ReadHost, MissingFilesLeaveDefaults) {
  const SysfsTree tree("workstation_roce");
  const auto device = tree.root() / "class/infiniband/mlx5_0";
  for (const char* name : {"state", "rate", "link_layer", "lid", "gids"}) {
    std::filesystem::remove_all(device / "ports/1" / name);
  }
  std::filesystem::remove(device / "node_type");
  std::filesystem::remove_all(tree.root() / "bus");
  const Host host = read_host(tree.root());
  ASSERT_EQ(host.ports.size(), 2U);
  const Port& port = host.ports[0];
  EXPECT_EQ(port.state, "");
  EXPECT_EQ(port.node_type, "");
  EXPECT_EQ(port.rate_gbps, 0);
  EXPECT_EQ(port.link_layer, LinkLayer::kUnknown);
  EXPECT_EQ(port.gid_slots, 0);
  EXPECT_TRUE(port.gids.empty());
  EXPECT_EQ(port.pci_address(), "0000:01:00.0");
  EXPECT_TRUE(host.pci.empty());
}

TEST(ReadHost, GidOfUnreadableTypeIsNone) {
  const SysfsTree tree("workstation_roce");
  std::filesystem::remove(tree.root() / "class/infiniband/mlx5_0/ports/1/gid_attrs/types/3");
  const std::vector<Gid> gids = read_host(tree.root()).ports.at(0).gids;
  ASSERT_EQ(gids.size(), 3U);
  EXPECT_EQ(gids.back().index, 2);
}

/// ibv_global_route::sgid_index has eight bits.
TEST(ReadHost, IgnoresGidsBeyondEightBits) {
  const SysfsTree tree("soft_roce");
  const auto port = tree.root() / "class/infiniband/rxe0/ports/1";
  for (int i = 4; i <= 256; ++i) {
    const std::string slot = std::to_string(i);
    std::ofstream(port / "gids" / slot) << "0000:0000:0000:0000:0000:ffff:0a4d:0002\n";
    std::ofstream(port / "gid_attrs/types" / slot) << "RoCE v2\n";
  }
  const Port read = read_host(tree.root()).ports.at(0);
  EXPECT_EQ(read.gid_slots, 256);
  EXPECT_EQ(read.gids.back().index, 255);
}

TEST(ReadHost, GidOfNetdevInAnotherNamespace) {
  const SysfsTree tree("roce_bond");
  std::filesystem::remove_all(tree.root() / "class/net");
  const std::vector<Gid> gids = read_host(tree.root()).ports.at(1).gids;
  EXPECT_FALSE(gids.at(0).netdev_down);
  EXPECT_TRUE(gids.at(5).vlan);   // by its name
  EXPECT_FALSE(gids.at(7).vlan);  // nothing tells
}

TEST(PciAddress, IsNormalised) {
  EXPECT_EQ(normal_pci_address("0000:3b:00.0"), "0000:3b:00.0");
  EXPECT_EQ(normal_pci_address("0000:3B:00.0"), "0000:3b:00.0");
  EXPECT_EQ(normal_pci_address("00000000:3B:00.0"), "0000:3b:00.0");
  EXPECT_EQ(normal_pci_address("3b:00.0"), "0000:3b:00.0");
  EXPECT_EQ(normal_pci_address("10000:e1:00.0"), "10000:e1:00.0");
  for (const char* bad : {"", "0", "3b", "3b:00", "0000:3b:00.0x", "pci:3b:00.0", "a:b:c:d.e"}) {
    EXPECT_EQ(normal_pci_address(bad), "") << bad;
  }
}

}  // namespace
}  // namespace rkv::verbs
