// SPDX-License-Identifier: Apache-2.0
#include "verbs/sysfs.h"

#include <arpa/inet.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <fstream>
#include <tuple>

namespace rkv::verbs {
namespace {

namespace fs = std::filesystem;

/// ibv_global_route::sgid_index is eight bits wide, so slots beyond cannot be used (Soft-RoCE has
/// 1024 of them).
constexpr int kUsableGidSlots = 256;

/// Empty when the file is missing or cannot be read: sysfs answers EINVAL for gid_attrs/types/N
/// of an empty slot.
std::string read_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

template <class T>
T parse(std::string_view text, T fallback) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() ? value : fallback;
}

/// "ACTIVE" of "4: ACTIVE".
std::string after_number(const std::string& text) {
  const auto colon = text.find(": ");
  return colon == std::string::npos ? text : text.substr(colon + 2);
}

std::vector<std::string> list_directory(const fs::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename());
  }
  // Natural order as far as the kernel's names need it: mlx5_9 before mlx5_10.
  std::sort(names.begin(), names.end(), [](const auto& a, const auto& b) {
    return std::forward_as_tuple(a.size(), a) < std::forward_as_tuple(b.size(), b);
  });
  return names;
}

/// A PCI device's directory, or that of something below it, with every link resolved. The last
/// PCI component is the device: sub-functions hang below it as auxiliary devices.
struct PciDirectory {
  fs::path directory = {};
  PciPath path = {};

  explicit PciDirectory(const fs::path& link) {
    std::error_code error;
    fs::path prefix;
    for (const fs::path& part : fs::canonical(link, error)) {
      prefix /= part;
      const std::string name = part;
      if (!name.starts_with("pci") && normal_pci_address(name) != name) continue;
      if (path.empty() && name.find(':') == std::string::npos) continue;
      path.push_back(name);
      directory = prefix;
    }
  }
};

PciDevice read_pci_device(const PciDirectory& at) {
  if (at.path.empty()) return {};
  return {.path = at.path,
          .numa_node = parse(read_line(at.directory / "numa_node"), -1),
          .pci_class = read_line(at.directory / "class")};
}

LinkLayer parse_link_layer(const std::string& text) {
  if (text == "InfiniBand") return LinkLayer::kInfiniBand;
  if (text == "Ethernet") return LinkLayer::kEthernet;
  return LinkLayer::kUnknown;
}

void read_netdev(const fs::path& sys, Gid& gid) {
  const fs::path netdev = sys / "class/net" / gid.netdev;
  const std::string state = read_line(netdev / "operstate");
  gid.netdev_down = state == "down" || state == "lowerlayerdown";
  // The netdev may be in another network namespace, where only its name is known.
  gid.vlan = gid.netdev.find('.') != std::string::npos;
  std::ifstream uevent(netdev / "uevent");
  for (std::string line; std::getline(uevent, line);) gid.vlan |= line == "DEVTYPE=vlan";
}

/// False for an empty slot.
bool read_gid(const fs::path& sys, const fs::path& port, LinkLayer layer, Gid& gid) {
  const std::string slot = std::to_string(gid.index);
  const std::string text = read_line(port / "gids" / slot);
  if (inet_pton(AF_INET6, text.c_str(), gid.raw.data()) != 1) return false;
  if (gid.raw == decltype(gid.raw){}) return false;
  if (layer != LinkLayer::kEthernet) return true;
  // The kernel calls both of them "IB/RoCE v1"; the link layer tells which.
  const std::string type = read_line(port / "gid_attrs/types" / slot);
  if (type.empty()) return false;
  gid.type = type == "RoCE v2" ? Gid::Type::kRoceV2 : Gid::Type::kRoceV1;
  gid.netdev = read_line(port / "gid_attrs/ndevs" / slot);
  if (!gid.netdev.empty()) read_netdev(sys, gid);
  return true;
}

/// The fields that each port has of its own.
void read_port(const fs::path& sys, const fs::path& directory, Port& port) {
  port.state = after_number(read_line(directory / "state"));
  port.link_layer = parse_link_layer(read_line(directory / "link_layer"));
  port.rate_gbps = parse(read_line(directory / "rate"), 0.0);  // "100 Gb/sec (4X EDR)"
  const std::string lid = read_line(directory / "lid");        // "0x1c"
  if (lid.starts_with("0x")) std::from_chars(&lid[2], lid.data() + lid.size(), port.lid, 16);
  const auto slots = static_cast<int>(list_directory(directory / "gids").size());
  port.gid_slots = std::min(slots, kUsableGidSlots);
  for (int i = 0; i < port.gid_slots; ++i) {
    Gid gid{.index = i};
    if (read_gid(sys, directory, port.link_layer, gid)) port.gids.push_back(gid);
  }
}

std::vector<Port> read_ports(const fs::path& sys, const std::string& device) {
  const fs::path directory = sys / "class/infiniband" / device;
  const PciDirectory pci(directory);
  const Port common{.device = device,
                    .node_type = after_number(read_line(directory / "node_type")),
                    .pci = read_pci_device(pci),
                    .local_cpus = read_line(pci.directory / "local_cpulist")};
  std::vector<Port> ports;
  for (const std::string& number : list_directory(directory / "ports")) {
    Port& port = ports.emplace_back(common);
    port.number = parse(number, 1);
    read_port(sys, directory / "ports" / number, port);
  }
  return ports;
}

const char* type_name(Gid::Type type) {
  switch (type) {
    case Gid::Type::kRoceV1:
      return "RoCE v1";
    case Gid::Type::kRoceV2:
      return "RoCE v2";
    case Gid::Type::kIb:
      break;
  }
  return "IB";
}

}  // namespace

const char* link_layer_name(LinkLayer layer) {
  if (layer == LinkLayer::kInfiniBand) return "InfiniBand";
  return layer == LinkLayer::kEthernet ? "Ethernet" : "unknown link layer";
}

bool Gid::ipv4_mapped() const {
  static constexpr std::array<std::uint8_t, 12> kPrefix{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::equal(kPrefix.begin(), kPrefix.end(), raw.begin());
}

bool Gid::link_local() const { return raw[0] == 0xfe && (raw[1] & 0xc0) == 0x80; }

std::string Gid::text() const {
  std::array<char, INET6_ADDRSTRLEN> address{};
  inet_ntop(AF_INET6, raw.data(), address.data(), address.size());
  std::string text = std::string(address.data()) + " (" + type_name(type);
  if (!netdev.empty()) text += ", " + netdev;
  if (vlan) text += ", VLAN";
  if (netdev_down) text += ", down";
  return text + ")";
}

std::string Port::pci_address() const { return pci.path.empty() ? "" : pci.path.back(); }

std::string normal_pci_address(std::string_view text) {
  const bool has_domain = std::count(text.begin(), text.end(), ':') == 2;
  const std::string whole = (has_domain ? "" : "0000:") + std::string(text);
  std::array<unsigned, 4> fields{};  // domain, bus, device, function
  const char* at = whole.data();
  const char* const end = at + whole.size();
  for (std::size_t i = 0; i < fields.size(); ++i) {
    if (i > 0 && (at == end || *at++ != ":::."[i])) return "";
    const auto [next, error] = std::from_chars(at, end, fields[i], 16);
    if (error != std::errc()) return "";
    at = next;
  }
  if (at != end) return "";
  std::array<char, 40> address{};
  std::snprintf(address.data(), address.size(), "%04x:%02x:%02x.%x", fields[0], fields[1],
                fields[2], fields[3]);
  return address.data();
}

Host read_host(const fs::path& sys) {
  Host host;
  for (const std::string& device : list_directory(sys / "class/infiniband")) {
    for (Port& port : read_ports(sys, device)) host.ports.push_back(std::move(port));
  }
  const fs::path devices = sys / "bus/pci/devices";
  for (const std::string& address : list_directory(devices)) {
    host.pci.emplace(address, read_pci_device(PciDirectory(devices / address)));
  }
  return host;
}

}  // namespace rkv::verbs
