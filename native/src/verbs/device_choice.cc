// SPDX-License-Identifier: Apache-2.0
#include "verbs/device_choice.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "verbs/gid_choice.h"

namespace rkv::verbs {
namespace {

/// Of the fastest port's rate. A NIC across the sockets gives about half of its rate, so a near one
/// is worth less than that only if it is slower still: a management NIC.
constexpr double kSlowShare = 0.5;

/// Where the memory is.
struct Place {
  PciDevice device = {};                           // for host memory only its NUMA node is known
  std::string text = {};                           // "0000:3b:00.0", "NUMA node 1", "" if unknown
  std::map<std::string, PciDevice> siblings = {};  // all of its PCI class by address: the GPUs

  [[nodiscard]] bool is_host_memory() const { return device.path.empty(); }
};

struct Candidate {
  const Port* port = nullptr;
  Gid gid = {};
  Distance distance = Distance::kUnknown;
};

std::string rate_text(const Port& port) {
  std::ostringstream text;
  text << port.rate_gbps << " Gb/s";
  return text.str();
}

std::string distance_text(Distance distance, const Place& place) {
  static constexpr std::array kNames{"PIX", "PXB", "PHB", "NODE", "SYS"};
  if (place.text.empty()) return "near is not set";
  if (distance == Distance::kUnknown) return "at an unknown distance from " + place.text;
  return std::string(kNames.at(static_cast<std::size_t>(distance))) + " from " + place.text;
}

std::string address_text(const Candidate& candidate) {
  const std::string gid =
      "GID " + std::to_string(candidate.gid.index) + " = " + candidate.gid.text();
  if (candidate.port->link_layer == LinkLayer::kEthernet) return gid;
  return "LID " + std::to_string(candidate.port->lid) + ", " + gid;
}

Place find_pci_place(const Host& host, const std::string& near) {
  const std::string address = normal_pci_address(near.substr(4));
  // A container may hide the PCI tree; then all ports are equally near.
  if (host.pci.empty() && !address.empty()) return {.text = address};
  const auto found = host.pci.find(address);
  if (found == host.pci.end()) {
    throw std::runtime_error("near is '" + near + "', but /sys/bus/pci/devices has no '" + address +
                             "'; `lspci -D` lists what there is");
  }
  Place place{.device = found->second, .text = address};
  for (const auto& sibling : host.pci) {
    if (sibling.second.pci_class == place.device.pci_class) place.siblings.insert(sibling);
  }
  return place;
}

Place find_place(const Host& host, const std::string& near) {
  if (near.empty()) return {};
  if (near.starts_with("pci:")) return find_pci_place(host, near);
  int node = -1;
  const char* end = near.data() + near.size();
  if (!near.starts_with("numa:") ||
      std::from_chars(near.data() + 5, end, node) != std::from_chars_result{end, {}} || node < 0) {
    throw std::runtime_error("near is '" + near +
                             "'; it must be empty, 'numa:<node>' or 'pci:<address>'");
  }
  return {.device = {.numa_node = node}, .text = "NUMA node " + std::to_string(node)};
}

/// Why the port cannot be used at all, to follow its name; empty, with the GID set, if it can be.
std::string find_fault(const Port& port, int gid_index, Gid& gid) {
  if (!port.node_type.empty() && port.node_type != "CA") {
    return " is of node type " + port.node_type + ", which has no InfiniBand or RoCE transport";
  }
  if (port.state == "INIT") return " is INIT (no subnet manager has configured it)";
  if (port.state != "ACTIVE") return port.state.empty() ? " has no state" : " is " + port.state;
  if (port.link_layer == LinkLayer::kUnknown) return " has an unknown link layer";
  return choose_gid(port, gid_index, gid);
}

/// Of `ports`, those that can be used.
std::vector<Candidate> find_usable(const std::vector<const Port*>& ports, int gid_index,
                                   const Place& place, std::vector<std::string>& rejected) {
  std::vector<Candidate> usable;
  for (const Port* port : ports) {
    Gid gid;
    const std::string fault = find_fault(*port, gid_index, gid);
    if (fault.empty()) {
      usable.push_back({port, gid, distance(place.device, port->pci)});
    } else {
      rejected.push_back(port->name() + fault);
    }
  }
  return usable;
}

template <class Keep, class Reason>
void keep_if(std::vector<Candidate>& candidates, std::vector<std::string>& rejected, Keep keep,
             Reason reason) {
  for (const Candidate& candidate : candidates) {
    if (!keep(candidate)) rejected.push_back(candidate.port->name() + reason(candidate));
  }
  std::erase_if(candidates, std::not_fn(keep));
}

/// Leaves out what would slow the others down or cannot be meant.
void drop_inferior(std::vector<Candidate>& candidates, std::vector<std::string>& rejected) {
  const auto is_hardware = [](const Candidate& c) { return !c.port->pci_address().empty(); };
  if (std::ranges::any_of(candidates, is_hardware)) {
    keep_if(candidates, rejected, is_hardware,
            [](const Candidate&) { return " is a software device"; });
  }
  const Port& fastest = *std::ranges::max_element(candidates, {}, [](const Candidate& c) {
                           return c.port->rate_gbps;
                         })->port;
  keep_if(
      candidates, rejected,
      [&](const Candidate& c) { return c.port->rate_gbps >= kSlowShare * fastest.rate_gbps; },
      [&](const Candidate& c) {
        return " is slow: " + rate_text(*c.port) + ", and " + fastest.name() + " has " +
               rate_text(fastest);
      });
}

/// Leaves the nearest of one rate and link layer: slices of one size are striped over them.
Distance keep_nearest(std::vector<Candidate>& candidates, const Place& place,
                      std::vector<std::string>& rejected) {
  const Candidate best = *std::ranges::min_element(
      candidates, {}, [](const Candidate& c) { return std::pair(c.distance, -c.port->rate_gbps); });
  keep_if(
      candidates, rejected, [&](const Candidate& c) { return c.distance == best.distance; },
      [&](const Candidate& c) { return " is farther: " + distance_text(c.distance, place); });
  keep_if(
      candidates, rejected,
      [&](const Candidate& c) {
        return c.port->rate_gbps == best.port->rate_gbps &&
               c.port->link_layer == best.port->link_layer;
      },
      [&](const Candidate& c) {
        return " is not like " + best.port->name() + ": " + rate_text(*c.port) + " " +
               link_layer_name(c.port->link_layer);
      });
  return best.distance;
}

/// Of ports at one distance, leaves those that choose_ports() promises.
void keep_share(std::vector<Candidate>& candidates, const Place& place, Distance at,
                std::vector<std::string>& rejected) {
  if (place.is_host_memory() && at == Distance::kNode) return;
  std::size_t siblings = 0;
  std::size_t turn = 0;  // of this GPU among those as near as it
  for (const auto& [address, device] : place.siblings) {
    if (distance(device, candidates.front().port->pci) != at) continue;
    if (address == place.text) turn = siblings;
    ++siblings;
  }
  const std::size_t n = candidates.size();
  const std::size_t share =
      siblings > 0 && at <= Distance::kPxb ? (n + siblings - 1) / siblings : 1;
  std::set<const Port*> own;
  for (std::size_t i = 0; i < share; ++i) own.insert(candidates[(turn * share + i) % n].port);
  keep_if(
      candidates, rejected, [&](const Candidate& c) { return own.contains(c.port); },
      [](const Candidate&) { return " is as near, and left to others"; });
}

std::vector<Candidate> choose_automatically(const Host& host, const ChoiceRequest& request,
                                            const Place& place,
                                            std::vector<std::string>& rejected) {
  std::vector<const Port*> all;
  for (const Port& port : host.ports) all.push_back(&port);
  std::vector<Candidate> candidates = find_usable(all, request.gid_index, place, rejected);
  if (candidates.empty()) {
    std::string text = "no RDMA port can be used:";
    for (const std::string& reason : rejected) text += "\n  " + reason;
    throw std::runtime_error(text + "\nbring a link up (`ibv_devinfo` shows all ports), or set " +
                             "backend to 'tcp'");
  }
  drop_inferior(candidates, rejected);
  const Distance nearest = keep_nearest(candidates, place, rejected);
  keep_share(candidates, place, nearest, rejected);
  return candidates;
}

/// The ports that one item of `devices` names: "mlx5_0" all of the device's, "mlx5_0:1" one.
std::vector<const Port*> find_named(const Host& host, const std::string& item) {
  std::vector<const Port*> found;
  std::string there;
  for (const Port& port : host.ports) {
    if (item == port.device || item == port.name()) found.push_back(&port);
    there += (there.empty() ? "" : ", ") + port.name();
  }
  if (found.empty()) {
    throw std::runtime_error("devices names '" + item + "', but this host has " + there +
                             "; set devices to some of these or to 'auto'");
  }
  return found;
}

std::vector<Candidate> choose_named(const Host& host, const ChoiceRequest& request,
                                    const Place& place, std::vector<std::string>& rejected) {
  std::vector<Candidate> chosen;
  std::istringstream items(request.devices + ",");
  for (std::string item; std::getline(items, item, ',');) {
    std::vector<std::string> faults;
    const auto usable = find_usable(find_named(host, item), request.gid_index, place, faults);
    if (usable.empty()) {
      throw std::runtime_error("devices names '" + item + "', but " + faults.front() +
                               "; `ibv_devinfo` shows all ports");
    }
    rejected.insert(rejected.end(), faults.begin(), faults.end());
    chosen.insert(chosen.end(), usable.begin(), usable.end());
  }
  std::set<const Port*> distinct;
  for (const Candidate& candidate : chosen) {
    if (distinct.insert(candidate.port).second) continue;
    throw std::runtime_error("devices names " + candidate.port->name() + " twice");
  }
  return chosen;
}

}  // namespace

Distance distance(const PciDevice& a, const PciDevice& b) {
  const auto shared = std::ranges::mismatch(a.path, b.path).in1 - a.path.begin();
  if (shared > 0) {
    if (a.path[static_cast<std::size_t>(shared) - 1].starts_with("pci")) return Distance::kPhb;
    // Both below the downstream ports of one switch, whose upstream port is the last one shared.
    const auto longest = static_cast<std::ptrdiff_t>(std::max(a.path.size(), b.path.size()));
    return longest - shared <= 2 ? Distance::kPix : Distance::kPxb;
  }
  if (a.numa_node < 0 || b.numa_node < 0) return Distance::kUnknown;
  return a.numa_node == b.numa_node ? Distance::kNode : Distance::kSys;
}

std::string Choice::text() const {
  std::string text;
  const auto add_line = [&text](const std::string& line) {
    text += (text.empty() ? "" : "\n") + line;
  };
  for (const ChosenPort& chosen : ports) {
    const Port& port = chosen.port;
    const std::string pci = port.pci_address();
    add_line(
        port.name() + " (" + link_layer_name(port.link_layer) + ", " + rate_text(port) + ", " +
        (pci.empty() ? "software" : pci + ", NUMA node " + std::to_string(port.pci.numa_node)) +
        "): " + chosen.why);
  }
  for (const std::string& reason : rejected) add_line("not used: " + reason);
  return text;
}

Choice choose_ports(const Host& host, const ChoiceRequest& request) {
  if (host.ports.empty()) {
    throw std::runtime_error(
        "no RDMA device: /sys/class/infiniband is missing or empty; load the NIC's driver (such "
        "as mlx5_ib), show /sys and /dev/infiniband to the container, or set backend to 'tcp'");
  }
  const Place place = find_place(host, request.near);
  const bool automatic = request.devices == "auto";
  Choice choice;
  const std::vector<Candidate> candidates =
      automatic ? choose_automatically(host, request, place, choice.rejected)
                : choose_named(host, request, place, choice.rejected);
  for (const Candidate& candidate : candidates) {
    choice.ports.push_back({.port = *candidate.port,
                            .gid = candidate.gid,
                            .why = (automatic ? "" : "named in devices, ") +
                                   distance_text(candidate.distance, place) + "; " +
                                   address_text(candidate)});
  }
  return choice;
}

}  // namespace rkv::verbs
