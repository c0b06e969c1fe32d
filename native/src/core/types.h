// SPDX-License-Identifier: Apache-2.0
/// Words that every layer of the engine shares.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>

namespace rkv {

using PeerId = std::uint64_t;      ///< One endpoint of this engine; never reused.
using TransferId = std::uint64_t;  ///< One write() of this engine; > 0, never reused.
using RegionId = std::uint32_t;    ///< Position in the list of registered or described memory.
using Bytes = std::string;         ///< Raw bytes: what sockets, descriptors and Python exchange.

enum class MemoryKind : std::uint8_t { kHost, kCuda };

/// What registered memory is and what it is for.
struct MemoryUse {
  MemoryKind kind = MemoryKind::kHost;
  bool peer_writable = true;  ///< False: a source of writes only.
};

/// One operation on the wire: contiguous on both sides, at most EngineConfig::block_size bytes.
struct WriteSlice {
  std::uint64_t local_address = 0;
  std::uint64_t remote_address = 0;
  std::uint64_t nbytes = 0;
  RegionId local_region = 0;
  RegionId remote_region = 0;

  bool operator==(const WriteSlice&) const = default;
};

enum class EventKind : std::uint8_t {
  kConnected,
  kTransferDone,
  kTransferFailed,
  kImm,
  kMessage,
  kPeerLost,
};

/// Times are CLOCK_MONOTONIC in nanoseconds, as Python's time.monotonic_ns().
struct Event {
  EventKind kind = EventKind::kConnected;
  PeerId peer = 0;
  TransferId id = 0;
  std::int64_t time_ns = 0;    ///< When the engine saw it.
  std::int64_t posted_ns = 0;  ///< kTransferDone: when the backend was given its last slice.
  std::uint32_t imm = 0;
  Bytes data = {};
  std::string reason = {};
};

/// Flat, ordered by name; seconds are doubles, everything else counts.
using Stats = std::map<std::string, std::variant<std::uint64_t, double>>;

}  // namespace rkv
