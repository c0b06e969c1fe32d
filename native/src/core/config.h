// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace rkv {

using Clock = std::chrono::steady_clock;

struct EngineConfig {
  std::string backend = "auto";
  std::string bind_host = "127.0.0.1";  ///< Address that peers reach; never a wildcard.
  std::int64_t block_size = 1 << 20;    ///< Bytes; a longer run is sliced into blocks of this.
  std::int64_t queue_depth = 1024;      ///< Slices per peer posted and not yet acknowledged.
  std::int64_t qps_per_peer = 2;        ///< Data connections to each peer.
  double peer_timeout_s = 5.0;          ///< A peer silent for this long is lost.
  double connect_timeout_s = 15.0;      ///< From connect() until both sides are ready.
  /// Busy polling after activity before blocking. On two busy cores 0 beat 50 (one 4 KiB block 181
  /// against 246 us, 32 KiB blocks 2.5 against 2.4 GB/s): who spins keeps the other end waiting.
  std::int64_t spin_us = 0;

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
