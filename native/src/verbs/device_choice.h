// SPDX-License-Identifier: Apache-2.0
/// Which ports to use, near the memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "verbs/sysfs.h"

namespace rkv::verbs {

/// Between a port and the memory, in the words of `nvidia-smi topo -m`, nearest first.
enum class Distance : std::uint8_t {
  kPix,      ///< At most one PCIe switch between them.
  kPxb,      ///< Several PCIe switches, no host bridge.
  kPhb,      ///< Through one PCIe host bridge.
  kNode,     ///< Between host bridges of one NUMA node.
  kSys,      ///< Between NUMA nodes.
  kUnknown,  ///< The memory's place or the port's is not known.
};

[[nodiscard]] Distance distance(const PciDevice& a, const PciDevice& b);

struct ChoiceRequest {
  std::string devices = "auto";  ///< Or "mlx5_0,mlx5_1:2": these, in this order.
  int gid_index = -1;            ///< -1: chosen by type.
  std::string near = {};         ///< Where the memory is: "", "numa:1", "pci:0000:3b:00.0".
};

struct ChosenPort {
  Port port = {};
  Gid gid = {};  ///< Its index is the one to use, on InfiniBand too.
  std::string why = {};
};

struct Choice {
  std::vector<ChosenPort> ports = {};      ///< At least one.
  std::vector<std::string> rejected = {};  ///< "mlx5_3:1 is DOWN"

  /// A line for each chosen port and for each one passed over; no final newline.
  [[nodiscard]] std::string text() const;
};

/// "auto" takes what is nearest to the memory, of one rate and link layer. Of several as near:
/// - near a GPU (PIX, PXB) its share, as NCCL does: with a NIC for each GPU its own, so that GPUs
///   do not meet on a NIC and a rail-optimised network sees rail i talk to rail i; both of two NICs
///   if no other GPU is as near.
/// - near host memory all of its NUMA node's, as Mooncake does: DRAM is faster than they are.
/// - otherwise one, GPUs taking turns. The way through the CPU is the narrow part (A100 PCIe: 11 to
///   12 GB/s across sockets, half of a 200 Gb/s NIC): a second NIC adds QPs and no bandwidth.
/// @throw std::runtime_error when no port can be used or the request cannot be met, with the state
///   of what is there and the remedy.
[[nodiscard]] Choice choose_ports(const Host& host, const ChoiceRequest& request);

}  // namespace rkv::verbs
