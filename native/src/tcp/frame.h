// SPDX-License-Identifier: Apache-2.0
/// What travels on a data lane: a header, a table, and for writes one contiguous payload in table
/// order. No header per block, no copy of our own, no allocation per block.
///
///   write   table: count x {u64 key, u64 address, u64 nbytes}   value: sum of nbytes
///   signal  table: count x u64, write frames sent so far by lane   value: the immediate
///   ack     no table                                               value: write frames landed
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/regions.h"
#include "core/types.h"

namespace rkv::tcp {

enum class FrameType : std::uint8_t { kWrite = 1, kSignal = 2, kAck = 3 };

struct FrameHeader {
  std::uint32_t magic;
  std::uint32_t count;
  std::uint64_t value;
  FrameType type;
  std::uint8_t zero[7];
};
static_assert(sizeof(FrameHeader) == 24);

struct TableEntry {
  std::uint64_t key;
  std::uint64_t address;
  std::uint64_t nbytes;
};
static_assert(sizeof(TableEntry) == 24);

constexpr std::uint32_t kFrameMagic = 0x46564b52;  // "RKVF"
/// With the prefetch buffer behind them all destinations of a frame fit one readv (IOV_MAX 1024).
constexpr std::size_t kMaxEntries = 1023;
/// A frame cannot be overtaken by the next on its lane, so its size bounds an ack's delay.
constexpr std::uint64_t kMaxFrameBytes = 8 << 20;
/// A frame is closed beyond this: acknowledgements come often enough to keep the queue moving.
constexpr std::uint64_t kTargetFrameBytes = 1 << 20;
/// Smaller batches go whole over one lane: a second lane costs a small batch 5 us of latency.
constexpr std::uint64_t kMinSplitBytes = 64 << 10;

constexpr std::size_t kMaxLanes = 16;
constexpr std::size_t kMaxHeadBytes = sizeof(FrameHeader) + kMaxEntries * sizeof(TableEntry);

/// One frame on its way out. iov[next] is the cursor; a short send moves it and never rebuilds.
struct OutFrame {
  std::vector<std::byte> head;  ///< Header and table; iov[0] points at it.
  std::vector<iovec> iov;
  std::size_t next = 0;
  bool begun = false;
  std::uint64_t nbytes = 0;
  TransferId transfer = 0;
  std::size_t slices = 0;  ///< 0: not a write, needs no acknowledgement.
};

/// Moves the cursor `next` of `iov` over `nbytes`.
void advance(std::vector<iovec>& iov, std::size_t& next, std::size_t nbytes);

/// Length of the prefix of `slices` that belongs in one frame of about `target_bytes`; at least 1.
[[nodiscard]] std::size_t frame_extent(std::span<const WriteSlice> slices,
                                       std::uint64_t target_bytes);

/// `keys` by remote region.
[[nodiscard]] OutFrame encode_write(TransferId transfer, std::span<const WriteSlice> slices,
                                    std::span<const std::uint64_t> keys);
[[nodiscard]] OutFrame encode_signal(std::uint32_t imm,
                                     std::span<const std::uint64_t> sent_by_lane);
[[nodiscard]] OutFrame encode_ack(std::uint64_t landed);

/// @throw FormatError unless the header is one that a peer may send.
void check_header(const FrameHeader& header);
[[nodiscard]] std::size_t table_bytes(const FrameHeader& header);

/// Registered memory by key. Keys are random and never reused, so a stale or foreign key names
/// nothing.
using KeyTable = std::unordered_map<std::uint64_t, MemoryRange>;

/// Checks every entry of a write's table and lists the destinations (empty entries dropped: a
/// readv of nothing but empty entries returns 0, like a lost peer).
/// @throw FormatError before a single byte of the payload is read.
void resolve_table(const FrameHeader& header, const std::byte* table, const KeyTable& keys,
                   std::vector<iovec>& destinations);

}  // namespace rkv::tcp
