// SPDX-License-Identifier: Apache-2.0
#include "tcp/frame.h"

#include <gtest/gtest.h>

#include <cstring>

#include "core/error.h"

namespace rkv::tcp {
namespace {

constexpr std::uint64_t kKey = 0x1234567890abcdef;

FrameHeader header_of(const OutFrame& frame) {
  FrameHeader header;
  std::memcpy(&header, frame.head.data(), sizeof header);
  return header;
}

std::vector<iovec> resolve(const FrameHeader& header, const std::vector<TableEntry>& table,
                           const KeyTable& keys) {
  std::vector<iovec> destinations;
  resolve_table(header, reinterpret_cast<const std::byte*>(table.data()), keys, destinations);
  return destinations;
}

FrameHeader write_header(std::uint32_t count, std::uint64_t payload) {
  return {kFrameMagic, count, payload, FrameType::kWrite, {}};
}

TEST(Frame, WriteCarriesKeysAddressesAndPayload) {
  std::string source(100, 's');
  const auto address = reinterpret_cast<std::uint64_t>(source.data());
  const std::vector<WriteSlice> slices{{address, 0x9000, 60, 0, 1},
                                       {address + 60, 0xa000, 40, 0, 0}};
  const OutFrame frame = encode_write(5, slices, std::vector<std::uint64_t>{11, kKey});
  const FrameHeader header = header_of(frame);
  check_header(header);
  EXPECT_EQ(header.value, 100U);
  EXPECT_EQ(frame.nbytes, sizeof header + table_bytes(header) + 100);
  TableEntry first;
  std::memcpy(&first, frame.head.data() + sizeof header, sizeof first);
  EXPECT_EQ(first.key, kKey);
  EXPECT_EQ(first.address, 0x9000U);
  ASSERT_EQ(frame.iov.size(), 3U);
  EXPECT_EQ(frame.iov[1].iov_base, source.data());
}

TEST(Frame, ExtentRespectsEntriesTargetAndLimit) {
  const std::vector<WriteSlice> small(5000, {0, 0, 64, 0, 0});
  EXPECT_EQ(frame_extent(small, kTargetFrameBytes), kMaxEntries);
  const std::vector<WriteSlice> pages(5000, {0, 0, 4096, 0, 0});
  EXPECT_EQ(frame_extent(pages, 64 << 10), 16U);
  const std::vector<WriteSlice> large(3, {0, 0, kMaxFrameBytes, 0, 0});
  EXPECT_EQ(frame_extent(large, kTargetFrameBytes), 1U);
}

TEST(Frame, CursorMovesAcrossEntries) {
  char buffer[30];
  std::vector<iovec> iov{{buffer, 10}, {buffer + 10, 10}, {buffer + 20, 10}};
  std::size_t next = 0;
  advance(iov, next, 15);
  EXPECT_EQ(next, 1U);
  EXPECT_EQ(iov[1].iov_base, buffer + 15);
  EXPECT_EQ(iov[1].iov_len, 5U);
  advance(iov, next, 15);
  EXPECT_EQ(next, 3U);
}

TEST(Frame, HeaderRefusesWhatNoPeerSends) {
  EXPECT_NO_THROW(check_header(write_header(1, 10)));
  EXPECT_THROW(check_header({1, 1, 10, FrameType::kWrite, {}}), FormatError);
  EXPECT_THROW(check_header({kFrameMagic, 1, 10, static_cast<FrameType>(9), {}}), FormatError);
  EXPECT_THROW(check_header({kFrameMagic, 1, 10, FrameType::kWrite, {0, 1}}), FormatError);
  EXPECT_THROW(check_header(write_header(0, 10)), FormatError);
  EXPECT_THROW(check_header(write_header(kMaxEntries + 1, 10)), FormatError);
  EXPECT_THROW(check_header(write_header(1, kMaxFrameBytes + 1)), FormatError);
  EXPECT_THROW(check_header({kFrameMagic, 17, 0, FrameType::kSignal, {}}), FormatError);
  EXPECT_THROW(check_header({kFrameMagic, 1, 1ULL << 32, FrameType::kSignal, {}}), FormatError);
  EXPECT_THROW(check_header({kFrameMagic, 1, 0, FrameType::kAck, {}}), FormatError);
}

TEST(Frame, TableIsCheckedBeforeAnyByteLands) {
  const KeyTable keys{{kKey, {0x1000, 0x1000}}, {9, {0x8000, 0x10}}};
  const auto n = resolve(write_header(3, 0x20),
                         {{kKey, 0x1000, 0x10}, {9, 0x8010, 0}, {9, 0x8000, 0x10}}, keys);
  EXPECT_EQ(n.size(), 2U) << "empty entries are dropped";
  EXPECT_THROW(resolve(write_header(1, 1), {{kKey + 1, 0x1000, 1}}, keys), FormatError);
  EXPECT_THROW(resolve(write_header(1, 1), {{kKey, 0xfff, 1}}, keys), FormatError);
  EXPECT_THROW(resolve(write_header(1, 1), {{kKey, 0x2000, 1}}, keys), FormatError);
  EXPECT_THROW(resolve(write_header(1, 1), {{kKey, UINT64_MAX, 2}}, keys), FormatError);
  EXPECT_THROW(resolve(write_header(1, 2), {{kKey, 0x1000, 1}}, keys), FormatError);
  EXPECT_THROW(resolve(write_header(2, 1), {{kKey, 0x1000, 1}, {9, 0x8000, UINT64_MAX}}, keys),
               FormatError);
}

TEST(Frame, SumOfEntriesCannotOverflow) {
  const KeyTable keys{{kKey, {0x1000, UINT64_MAX - 0x1000}}};
  const std::uint64_t half = 1ULL << 63;
  EXPECT_THROW(resolve(write_header(2, 0), {{kKey, 0x1000, half}, {kKey, 0x1000, half}}, keys),
               FormatError);
}

}  // namespace
}  // namespace rkv::tcp
