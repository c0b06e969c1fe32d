// SPDX-License-Identifier: Apache-2.0
#include "tcp/frame.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace rkv::tcp {
namespace {

OutFrame make_frame(FrameType type, std::uint64_t value, const void* table, std::size_t count,
                    std::size_t entry_bytes) {
  const FrameHeader header{.magic = kFrameMagic,
                           .count = static_cast<std::uint32_t>(count),
                           .value = value,
                           .type = type,
                           .zero = {}};
  OutFrame frame;
  frame.head.resize(sizeof header + count * entry_bytes);
  std::memcpy(frame.head.data(), &header, sizeof header);
  if (count > 0) std::memcpy(frame.head.data() + sizeof header, table, count * entry_bytes);
  frame.iov.push_back({frame.head.data(), frame.head.size()});
  frame.nbytes = frame.head.size();
  return frame;
}

iovec to_iovec(std::uint64_t address, std::uint64_t nbytes) {
  return {reinterpret_cast<void*>(address), nbytes};
}

[[noreturn]] void throw_bad_entry(std::size_t i, const TableEntry& entry, const char* why) {
  throw FormatError("write frame, entry " + std::to_string(i) + ": " +
                    MemoryRange{entry.address, entry.nbytes}.text() + " " + why);
}

}  // namespace

void advance(std::vector<iovec>& iov, std::size_t& next, std::size_t nbytes) {
  while (nbytes > 0) {
    iovec& front = iov[next];
    const std::size_t taken = std::min(nbytes, front.iov_len);
    front.iov_base = static_cast<std::byte*>(front.iov_base) + taken;
    front.iov_len -= taken;
    nbytes -= taken;
    if (front.iov_len == 0) ++next;
  }
}

std::size_t frame_extent(std::span<const WriteSlice> slices, std::uint64_t target_bytes) {
  std::uint64_t total = 0;
  std::size_t n = 0;
  while (n < slices.size() && n < kMaxEntries && (n == 0 || total < target_bytes) &&
         total + slices[n].nbytes <= kMaxFrameBytes) {
    total += slices[n++].nbytes;
  }
  return n;
}

OutFrame encode_write(TransferId transfer, std::span<const WriteSlice> slices,
                      std::span<const std::uint64_t> keys) {
  std::vector<TableEntry> table;
  table.reserve(slices.size());
  std::uint64_t payload = 0;
  for (const WriteSlice& slice : slices) {
    table.push_back({keys[slice.remote_region], slice.remote_address, slice.nbytes});
    payload += slice.nbytes;
  }
  OutFrame frame =
      make_frame(FrameType::kWrite, payload, table.data(), table.size(), sizeof(TableEntry));
  frame.iov.reserve(1 + slices.size());
  for (const WriteSlice& slice : slices) {
    frame.iov.push_back(to_iovec(slice.local_address, slice.nbytes));
  }
  frame.nbytes += payload;
  frame.transfer = transfer;
  frame.slices = slices.size();
  return frame;
}

OutFrame encode_signal(std::uint32_t imm, std::span<const std::uint64_t> sent_by_lane) {
  return make_frame(FrameType::kSignal, imm, sent_by_lane.data(), sent_by_lane.size(),
                    sizeof(std::uint64_t));
}

OutFrame encode_ack(std::uint64_t landed) {
  return make_frame(FrameType::kAck, landed, nullptr, 0, 0);
}

void check_header(const FrameHeader& header) {
  if (header.magic != kFrameMagic) throw FormatError("frame with a bad magic");
  const auto zero = [](std::uint8_t byte) { return byte == 0; };
  if (!std::all_of(std::begin(header.zero), std::end(header.zero), zero)) {
    throw FormatError("frame with padding that is not zero");
  }
  switch (header.type) {
    case FrameType::kWrite:
      if (header.count == 0 || header.count > kMaxEntries || header.value > kMaxFrameBytes) break;
      return;
    case FrameType::kSignal:
      if (header.count == 0 || header.count > kMaxLanes || header.value > UINT32_MAX) break;
      return;
    case FrameType::kAck:
      if (header.count != 0) break;
      return;
    default:
      throw FormatError("frame of unknown type " +
                        std::to_string(static_cast<unsigned>(header.type)));
  }
  throw FormatError("frame of type " + std::to_string(static_cast<unsigned>(header.type)) +
                    " with count " + std::to_string(header.count) + " and value " +
                    std::to_string(header.value));
}

std::size_t table_bytes(const FrameHeader& header) {
  if (header.type == FrameType::kWrite) return header.count * sizeof(TableEntry);
  if (header.type == FrameType::kSignal) return header.count * sizeof(std::uint64_t);
  return 0;
}

void resolve_table(const FrameHeader& header, const std::byte* table, const KeyTable& keys,
                   std::vector<iovec>& destinations) {
  destinations.clear();
  std::uint64_t payload = 0;
  auto region = keys.end();
  for (std::size_t i = 0; i < header.count; ++i) {
    TableEntry entry;
    std::memcpy(&entry, table + i * sizeof entry, sizeof entry);
    if (region == keys.end() || region->first != entry.key) region = keys.find(entry.key);
    if (region == keys.end()) {
      throw_bad_entry(i, entry, "has a key that names no memory registered here (any more)");
    }
    if (!region->second.contains(entry.address, entry.nbytes)) {
      throw_bad_entry(i, entry, "is outside the memory of its key");
    }
    if (entry.nbytes > kMaxFrameBytes - payload) throw_bad_entry(i, entry, "exceeds the frame");
    payload += entry.nbytes;
    if (entry.nbytes > 0) destinations.push_back(to_iovec(entry.address, entry.nbytes));
  }
  if (payload != header.value) {
    throw FormatError("write frame announces " + std::to_string(header.value) +
                      " bytes, its table " + std::to_string(payload));
  }
}

}  // namespace rkv::tcp
