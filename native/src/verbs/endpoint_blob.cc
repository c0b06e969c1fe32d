// SPDX-License-Identifier: Apache-2.0
#include "verbs/endpoint_blob.h"

#include <algorithm>

#include "core/wire.h"

namespace rkv::verbs {
namespace {

constexpr std::uint8_t kVersion = 1;

void encode_address(ByteWriter& writer, const RailAddress& address) {
  writer.put(static_cast<std::uint8_t>(address.link_layer));
  writer.put_bytes({reinterpret_cast<const char*>(address.gid.data()), address.gid.size()});
  writer.put(static_cast<std::uint8_t>(address.gid_type));
  writer.put(address.lid);
  writer.put(address.mtu);
  writer.put(static_cast<std::uint32_t>(address.rate_gbps));
  writer.put(static_cast<std::uint8_t>(address.subnet_bits));
}

RailAddress decode_address(ByteReader& reader) {
  RailAddress address;
  address.link_layer = static_cast<LinkLayer>(reader.get<std::uint8_t>("link layer"));
  const std::string_view gid = reader.get_bytes(address.gid.size(), "GID");
  std::copy(gid.begin(), gid.end(), address.gid.begin());
  address.gid_type = static_cast<Gid::Type>(reader.get<std::uint8_t>("GID type"));
  address.lid = reader.get<std::uint16_t>("LID");
  address.mtu = reader.get<std::uint8_t>("MTU");
  address.rate_gbps = reader.get<std::uint32_t>("rate");
  address.subnet_bits = reader.get<std::uint8_t>("subnet");
  if (address.mtu < IBV_MTU_256 || address.mtu > IBV_MTU_4096 || address.subnet_bits > 128) {
    throw FormatError("with an impossible MTU or subnet");
  }
  return address;
}

std::vector<RailEndpoint> decode_rails(std::string_view bytes) {
  ByteReader reader(bytes);
  if (const auto version = reader.get<std::uint8_t>("version"); version != kVersion) {
    throw FormatError("of verbs version " + std::to_string(version) + "; this engine speaks " +
                      std::to_string(kVersion));
  }
  std::vector<RailEndpoint> rails(reader.get<std::uint8_t>("number of rails"));
  for (RailEndpoint& rail : rails) {
    rail.address = decode_address(reader);
    rail.qps.resize(reader.get<std::uint8_t>("number of QPs"));
    if (rail.qps.empty()) throw FormatError("with a rail that has no QPs");
    for (QpAddress& qp : rail.qps) {
      qp.number = reader.get<std::uint32_t>("QP number");
      qp.psn = reader.get<std::uint32_t>("PSN");
    }
  }
  reader.expect_end();
  return rails;
}

void decode_region(const RemoteMemory& memory, RegionId region, std::uint64_t block_size,
                   std::vector<KeysByRegion>& by_rail) {
  ByteReader reader(memory.blob);
  const auto rails = reader.get<std::uint8_t>("number of rails");
  if (rails != by_rail.size()) {
    throw FormatError("for " + std::to_string(rails) + " rails; the endpoint has " +
                      std::to_string(by_rail.size()));
  }
  for (KeysByRegion& keys : by_rail) {
    const RegionKeys& of_region = keys[region] = RegionKeys::decode(reader, memory.range);
    if (of_region.keys.size() > 1 && of_region.chunk_bytes < block_size) {
      throw FormatError("registered in chunks of " + std::to_string(of_region.chunk_bytes) +
                        " bytes; set block_size to at most that on both sides");
    }
  }
  reader.expect_end();
}

}  // namespace

Bytes encode_endpoint(const std::vector<RailEndpoint>& rails) {
  ByteWriter writer;
  writer.put(kVersion);
  writer.put(static_cast<std::uint8_t>(rails.size()));
  for (const RailEndpoint& rail : rails) {
    encode_address(writer, rail.address);
    writer.put(static_cast<std::uint8_t>(rail.qps.size()));
    for (const QpAddress& qp : rail.qps) {
      writer.put(qp.number);
      writer.put(qp.psn);
    }
  }
  return writer.take();
}

std::vector<RailEndpoint> decode_endpoint(std::string_view bytes) {
  try {
    return decode_rails(bytes);
  } catch (const FormatError& error) {
    throw FormatError(std::string("connect(): the endpoint's RDMA address is ") + error.what());
  }
}

std::vector<KeysByRegion> decode_memory(const std::vector<RemoteMemory>& memory, std::size_t rails,
                                        std::uint64_t block_size) {
  std::vector<KeysByRegion> by_rail(rails);
  for (RegionId region = 0; region < memory.size(); ++region) {
    try {
      decode_region(memory[region], region, block_size, by_rail);
    } catch (const FormatError& error) {
      throw FormatError("connect(): memory descriptor " + std::to_string(region) + " is " +
                        error.what());
    }
  }
  return by_rail;
}

}  // namespace rkv::verbs
