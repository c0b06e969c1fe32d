// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace rkv {

using Clock = std::chrono::steady_clock;

inline std::int64_t nanoseconds(Clock::time_point time) {
  return std::chrono::nanoseconds(time.time_since_epoch()).count();
}

struct EngineConfig {
  static constexpr std::int64_t kAuto = -1;

  std::string backend = "auto";
  std::string bind_host = "127.0.0.1";  ///< Address that peers reach; never a wildcard.
  std::string devices = "auto";         ///< RDMA devices, such as "mlx5_0,mlx5_1:2" (name:port).
  std::int64_t gid_index = kAuto;       ///< Into the GID table of those devices' ports.
  std::string near = {};                ///< Where the memory is: "numa:1", "pci:0000:3b:00.0".
  std::int64_t traffic_class = 0;       ///< Of RoCE packets; DSCP is its upper six bits.
  std::int64_t service_level = 0;       ///< Of InfiniBand and RoCE (priority).
  std::int64_t block_size = 1 << 20;    ///< Bytes; a longer run is sliced into blocks of this.
  std::int64_t queue_depth = 1024;      ///< Slices per peer posted and not yet acknowledged.
  std::int64_t qps_per_peer = 2;        ///< Data connections to each peer.
  double peer_timeout_s = 5.0;          ///< A peer silent for this long is lost.
  double connect_timeout_s = 15.0;      ///< From connect() until both sides are ready.
  std::int64_t spin_us = kAuto;         ///< Busy polling after activity; auto: the backend's own.
  std::int64_t progress_cpu = kAuto;    ///< CPU of the progress thread; auto: those near the NIC.
  std::string link = {};                ///< Emulated, to each peer: "25GB/s+5us"; empty: none.

  /// @throw std::invalid_argument naming the field, its value and what is allowed.
  void validate() const;

  [[nodiscard]] Clock::duration peer_timeout() const { return seconds(peer_timeout_s); }
  [[nodiscard]] Clock::duration connect_timeout() const { return seconds(connect_timeout_s); }
  /// Five chances to be heard before the timeout.
  [[nodiscard]] Clock::duration heartbeat_interval() const { return peer_timeout() / 5; }

 private:
  static Clock::duration seconds(double value) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
  }
};

}  // namespace rkv
