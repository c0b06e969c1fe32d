// SPDX-License-Identifier: Apache-2.0
/// What backends tell each other, in whole and in pieces.
#include "verbs/endpoint_blob.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "core/wire.h"
#include "verbs/region_keys.h"

namespace rkv::verbs {
namespace {

RailEndpoint rail(std::uint8_t last, std::vector<QpAddress> qps) {
  RailEndpoint endpoint;
  endpoint.address = {.link_layer = LinkLayer::kEthernet,
                      .gid_type = Gid::Type::kRoceV2,
                      .lid = 7,
                      .mtu = IBV_MTU_4096,
                      .rate_gbps = 200,
                      .subnet_bits = 120};
  endpoint.address.gid[15] = last;
  endpoint.qps = std::move(qps);
  return endpoint;
}

std::string format_error(const std::function<void()>& decode) {
  try {
    decode();
  } catch (const FormatError& error) {
    return error.what();
  }
  return "";
}

TEST(EndpointBlob, RoundTrip) {
  const std::vector<RailEndpoint> rails{rail(1, {{0x123456, 0xabcdef}, {2, 3}}), rail(2, {{4, 5}})};
  const std::vector<RailEndpoint> decoded = decode_endpoint(encode_endpoint(rails));
  ASSERT_EQ(decoded.size(), 2U);
  EXPECT_EQ(decoded[0].address.link_layer, LinkLayer::kEthernet);
  EXPECT_EQ(decoded[0].address.gid, rails[0].address.gid);
  EXPECT_EQ(decoded[0].address.gid_type, Gid::Type::kRoceV2);
  EXPECT_EQ(decoded[0].address.lid, 7);
  EXPECT_EQ(decoded[0].address.mtu, IBV_MTU_4096);
  EXPECT_EQ(decoded[0].address.rate_gbps, 200);
  EXPECT_EQ(decoded[0].address.subnet_bits, 120);
  ASSERT_EQ(decoded[0].qps.size(), 2U);
  EXPECT_EQ(decoded[0].qps[0].number, 0x123456U);
  EXPECT_EQ(decoded[0].qps[0].psn, 0xabcdefU);
  ASSERT_EQ(decoded[1].qps.size(), 1U);
  EXPECT_EQ(decoded[1].address.gid[15], 2);
}

TEST(EndpointBlob, EveryTruncationNamesItsField) {
  const Bytes blob = encode_endpoint({rail(1, {{1, 2}})});
  const std::vector<std::pair<std::size_t, std::string>> fields{
      {1, "version"},    {1, "number of rails"},
      {1, "link layer"}, {16, "GID"},
      {1, "GID type"},   {2, "LID"},
      {1, "MTU"},        {4, "rate"},
      {1, "subnet"},     {1, "number of QPs"},
      {4, "QP number"},  {4, "PSN"}};
  std::size_t length = 0;
  for (const auto& [nbytes, field] : fields) {
    for (std::size_t i = 0; i < nbytes; ++i, ++length) {
      // A copy of its own size, so that the sanitizers see a read beyond it.
      const Bytes cut(blob.begin(), blob.begin() + static_cast<std::ptrdiff_t>(length));
      EXPECT_EQ(format_error([&] { (void)decode_endpoint(cut); }),
                "connect(): the endpoint's RDMA address is truncated at its " + field);
    }
  }
  EXPECT_EQ(length, blob.size());
  EXPECT_EQ(format_error([&] { (void)decode_endpoint(blob + "x"); }),
            "connect(): the endpoint's RDMA address is 1 bytes too long");
}

TEST(EndpointBlob, ImpossibleValues) {
  const auto error = [](RailEndpoint endpoint) {
    return format_error([&] { (void)decode_endpoint(encode_endpoint({std::move(endpoint)})); });
  };
  RailEndpoint endpoint = rail(1, {{1, 2}});
  endpoint.address.mtu = 0;
  EXPECT_NE(error(endpoint).find("MTU"), std::string::npos);
  endpoint.address.mtu = IBV_MTU_4096 + 1;
  EXPECT_NE(error(endpoint).find("MTU"), std::string::npos);
  endpoint = rail(1, {{1, 2}});
  endpoint.address.subnet_bits = 129;
  EXPECT_NE(error(endpoint).find("subnet"), std::string::npos);
  EXPECT_NE(error(rail(1, {})).find("QPs"), std::string::npos);
  Bytes blob = encode_endpoint({rail(1, {{1, 2}})});
  blob[0] = 9;
  EXPECT_NE(format_error([&] { (void)decode_endpoint(blob); }).find("version 9"),
            std::string::npos);
}

TEST(EndpointBlob, RandomBytesAreRefusedOrUnderstood) {
  std::mt19937_64 random(5);
  const Bytes blob = encode_endpoint({rail(1, {{1, 2}, {3, 4}}), rail(2, {{5, 6}})});
  for (int round = 0; round < 20000; ++round) {
    Bytes spoiled = blob;
    for (std::uint64_t i = random() % 4 + 1; i > 0; --i) {
      spoiled[random() % spoiled.size()] = static_cast<char>(random());
    }
    spoiled.resize(random() % (spoiled.size() + 1));
    spoiled.shrink_to_fit();
    try {
      (void)decode_endpoint(spoiled);
    } catch (const FormatError&) {
    }
  }
}

constexpr MemoryRange kRange{.address = 0x1000, .nbytes = 10000};

Bytes encode(const RegionKeys& keys) {
  ByteWriter writer;
  keys.encode(writer);
  return writer.take();
}

std::string keys_error(const Bytes& bytes) {
  return format_error([&] {
    ByteReader reader(bytes);
    (void)RegionKeys::decode(reader, kRange);
  });
}

TEST(RegionKeys, RoundTrip) {
  const Bytes bytes = encode({.chunk_bytes = 4096, .keys = {7, 8, 9}});
  ByteReader reader(bytes);
  const RegionKeys keys = RegionKeys::decode(reader, kRange);
  reader.expect_end();
  EXPECT_EQ(keys.base, kRange.address);
  EXPECT_EQ(keys.chunk_bytes, 4096U);
  EXPECT_EQ(keys.keys, (std::vector<std::uint32_t>{7, 8, 9}));
}

TEST(RegionKeys, EveryTruncationNamesItsField) {
  const Bytes bytes = encode({.chunk_bytes = 4096, .keys = {7, 8, 9}});
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    const Bytes cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(length));
    const char* field = length < 8 ? "chunk size" : length < 12 ? "number of rkeys" : "rkey";
    EXPECT_EQ(keys_error(cut), std::string("truncated at its ") + field) << length;
  }
}

TEST(RegionKeys, MustCoverTheRegionExactly) {
  const auto error = [](std::uint64_t chunk_bytes, std::size_t n) {
    return keys_error(encode({.chunk_bytes = chunk_bytes, .keys = std::vector<std::uint32_t>(n)}));
  };
  EXPECT_EQ(error(4096, 3), "");
  EXPECT_EQ(error(10000, 1), "");
  EXPECT_EQ(error(UINT64_MAX, 1), "");
  EXPECT_EQ(error(4096, 2), "with 2 rkeys for 10000 bytes in chunks of 4096");
  for (const auto& [chunk_bytes, n] : std::vector<std::pair<std::uint64_t, std::size_t>>{
           {4096, 4}, {4096, 0}, {0, 0}, {0, 1}, {9999, 1}, {UINT64_MAX, 2}}) {
    EXPECT_NE(error(chunk_bytes, n).find("rkeys for"), std::string::npos) << chunk_bytes;
  }
}

/// A count that no memory could hold is met by the end of the bytes, not by an allocation.
TEST(RegionKeys, HugeCount) {
  ByteWriter writer;
  writer.put(std::uint64_t{1});
  writer.put(std::uint32_t{4000000000});
  const Bytes bytes = writer.take();
  ByteReader reader(bytes);
  EXPECT_EQ(
      format_error([&] { (void)RegionKeys::decode(reader, {.address = 0, .nbytes = 4000000000}); }),
      "truncated at its rkey");
}

Bytes encode_for_rails(std::uint8_t rails, const RegionKeys& keys) {
  ByteWriter writer;
  writer.put(rails);
  for (std::uint8_t i = 0; i < rails; ++i) keys.encode(writer);
  return writer.take();
}

TEST(DecodeMemory, KeysByRailAndRegion) {
  const Bytes one = encode_for_rails(2, {.chunk_bytes = 10000, .keys = {7}});
  const Bytes other = encode_for_rails(2, {.chunk_bytes = 4096, .keys = {7, 8, 9}});
  const auto by_rail = decode_memory({{kRange, one}, {kRange, other}}, 2, 4096);
  ASSERT_EQ(by_rail.size(), 2U);
  EXPECT_EQ(by_rail[1].at(0).keys.size(), 1U);
  EXPECT_EQ(by_rail[1].at(1).keys.size(), 3U);
}

TEST(DecodeMemory, ErrorsNameTheDescriptor) {
  const Bytes good = encode_for_rails(1, {.chunk_bytes = 10000, .keys = {7}});
  const auto error = [&](const Bytes& bytes, std::uint64_t block_size) {
    return format_error(
        [&] { (void)decode_memory({{kRange, good}, {kRange, bytes}}, 1, block_size); });
  };
  const std::string prefix = "connect(): memory descriptor 1 is ";
  EXPECT_EQ(error(good, 1 << 20), "");  // One key is good for slices of any size.
  EXPECT_EQ(error("", 4096), prefix + "truncated at its number of rails");
  EXPECT_EQ(error(good + "x", 4096), prefix + "1 bytes too long");
  EXPECT_EQ(error(encode_for_rails(2, {.chunk_bytes = 10000, .keys = {7}}), 4096),
            prefix + "for 2 rails; the endpoint has 1");
  const Bytes chunks = encode_for_rails(1, {.chunk_bytes = 4096, .keys = {7, 8, 9}});
  EXPECT_EQ(error(chunks, 4096), "");
  // A slice of 8192 bytes would cross two edges.
  EXPECT_EQ(error(chunks, 8192), prefix +
                                     "registered in chunks of 4096 bytes; set block_size to "
                                     "at most that on both sides");
}

}  // namespace
}  // namespace rkv::verbs
