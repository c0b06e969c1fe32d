// SPDX-License-Identifier: Apache-2.0
/// What the kernel says of RDMA devices and where they sit in the machine. Nothing is opened, so
/// this works on a login node, and on a recorded tree in place of /sys.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace rkv::verbs {

enum class LinkLayer : std::uint8_t { kUnknown, kInfiniBand, kEthernet };

/// "InfiniBand", "Ethernet", "unknown link layer".
[[nodiscard]] const char* link_layer_name(LinkLayer layer);

/// One filled slot of a port's GID table.
struct Gid {
  enum class Type : std::uint8_t { kIb, kRoceV1, kRoceV2 };

  int index = 0;
  std::array<std::uint8_t, 16> raw{};
  Type type = Type::kIb;
  std::string netdev = {};  ///< Empty on InfiniBand.
  bool vlan = false;        ///< The netdev is a VLAN.
  bool netdev_down = false;

  [[nodiscard]] bool ipv4_mapped() const;
  [[nodiscard]] bool link_local() const;  ///< fe80::/10
  /// "::ffff:10.0.0.1 (RoCE v2, eth0)".
  [[nodiscard]] std::string text() const;
};

/// From the host bridge down to the device itself: {"pci0000:15", "0000:15:01.0", ...}. Empty for
/// what is not a PCI device.
using PciPath = std::vector<std::string>;

struct PciDevice {
  PciPath path = {};
  int numa_node = -1;          ///< -1: the kernel knows none.
  std::string pci_class = {};  ///< "0x030200" is a GPU without display output.
};

struct Port {
  std::string device = {};     ///< "mlx5_0"
  int number = 1;              ///< Ports count from 1.
  std::string node_type = {};  ///< "CA"; "RNIC" is iWARP; empty if unreadable.
  std::string state = {};      ///< "ACTIVE", "DOWN", "INIT", ...; empty if unreadable.
  LinkLayer link_layer = LinkLayer::kUnknown;
  std::uint16_t lid = 0;       ///< 0 on Ethernet.
  double rate_gbps = 0;        ///< 0 if unreadable.
  PciDevice pci = {};          ///< Its path is empty for a software device such as rxe0.
  std::string local_cpus{};    ///< "0-31,64-95"; empty if unreadable.
  int gid_slots = 0;           ///< Of the GID table; those from 256 on cannot be used.
  std::vector<Gid> gids = {};  ///< The filled slots, by index.

  [[nodiscard]] std::string name() const { return device + ":" + std::to_string(number); }
  /// "0000:3b:00.0"; empty for a software device.
  [[nodiscard]] std::string pci_address() const;
};

struct Host {
  std::vector<Port> ports;               ///< By device in natural order, then by number.
  std::map<std::string, PciDevice> pci;  ///< Every PCI device by address.
};

/// Missing or unreadable files leave their field at its default; a host without RDMA has no ports.
[[nodiscard]] Host read_host(const std::filesystem::path& sys = "/sys");

/// An address as sysfs writes it, from "0000:3B:00.0" (CUDA), "00000000:3B:00.0" (NVML) or
/// "3b:00.0" (lspci). Empty if the text is no PCI address.
[[nodiscard]] std::string normal_pci_address(std::string_view text);

}  // namespace rkv::verbs
