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
  ByteReader reader(bytes);
  if (const auto version = reader.get<std::uint8_t>("version"); version != kVersion) {
    throw FormatError("of verbs version " + std::to_string(version) + "; this engine speaks " +
                      std::to_string(kVersion));
  }
  std::vector<RailEndpoint> rails(reader.get<std::uint8_t>("number of rails"));
  for (RailEndpoint& rail : rails) {
    rail.address = decode_address(reader);
    rail.qps.resize(reader.get<std::uint8_t>("number of QPs"));
    for (QpAddress& qp : rail.qps) {
      qp.number = reader.get<std::uint32_t>("QP number");
      qp.psn = reader.get<std::uint32_t>("PSN");
    }
  }
  reader.expect_end();
  return rails;
}

}  // namespace rkv::verbs
