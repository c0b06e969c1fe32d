// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <infiniband/verbs.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "core/types.h"
#include "verbs/region_keys.h"

namespace rkv::verbs {

constexpr std::uint32_t kMaxChainWrs = 64;  ///< WRs a doorbell.
constexpr std::uint32_t kMaxSge = 16;       ///< SGEs a WR, where the device takes as many.
/// WRs that one slice may need: it can cross one chunk edge here and one at the peer.
constexpr std::uint32_t kMaxWrsPerSlice = 3;
static_assert(kMaxWrsPerSlice <= kMaxChainWrs, "a slice must fit into a chain");

/// What a chain may hold.
struct ChainLimits {
  std::uint32_t wrs = kMaxChainWrs;  ///< At least kMaxWrsPerSlice.
  std::uint64_t nbytes = 0;          ///< The slice that reaches it is the last one.
  std::uint64_t wr_bytes = 0;        ///< Of one WR gathered from several slices.
  std::uint32_t sges = 1;            ///< Of one WR.
  std::uint32_t inline_bytes = 0;    ///< WRs up to this size are copied into the WQE by the CPU.
};

/// Turns slices into a chain of RDMA WRITE work requests. Pure: knows keys, not devices.
///
/// Neighbouring slices whose targets are contiguous become one WR that gathers its sources.
class ChainBuilder {
 public:
  ChainBuilder();

  /// Builds WRs of a prefix of `slices`. @return its length; at least one.
  std::size_t build(std::span<const WriteSlice> slices, const KeysByRegion& local,
                    const KeysByRegion& remote, const ChainLimits& limits);

  /// The chain built last, ready to post: every WR carries `wr_id`, only the last is signalled.
  /// With `imm` the last WR tells the peer so.
  [[nodiscard]] ibv_send_wr* finish(std::uint64_t wr_id, std::optional<std::uint32_t> imm);

  [[nodiscard]] std::uint32_t wrs() const { return wrs_; }
  [[nodiscard]] std::uint32_t sges() const { return sges_; }
  [[nodiscard]] std::uint64_t nbytes() const { return nbytes_; }

 private:
  struct Target {
    std::uint64_t end = 0;  // address behind the last WR's last byte
    std::uint64_t nbytes = 0;
    std::uint32_t rkey = 0;
    bool cpu_readable = true;  // all that the last WR gathers
  };

  void add_slice(const WriteSlice& slice, const RegionKeys& local, const RegionKeys& remote,
                 const ChainLimits& limits);
  void add_piece(const ibv_sge& piece, bool cpu_readable, std::uint64_t remote_address,
                 std::uint32_t rkey, const ChainLimits& limits);

  std::array<ibv_send_wr, kMaxChainWrs> wr_;
  std::array<ibv_sge, std::size_t{kMaxChainWrs} * kMaxSge> sge_;
  std::uint32_t wrs_ = 0;
  std::uint32_t sges_ = 0;
  std::uint64_t nbytes_ = 0;
  Target last_;
};

}  // namespace rkv::verbs
