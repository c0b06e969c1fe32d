// SPDX-License-Identifier: Apache-2.0
#include "core/endpoint_descriptor.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>

#include "core/wire.h"

namespace rkv {
namespace {

constexpr std::uint32_t kMagic = 0x45564b52;  // "RKVE"
constexpr std::uint16_t kVersion = 1;

void fill_random(void* buffer, std::size_t n) {
  // Up to 256 bytes getrandom() is all or nothing (random(7)).
  if (getrandom(buffer, n, 0) != static_cast<ssize_t>(n)) throw_errno("getrandom", errno);
}

}  // namespace

Token random_token() {
  Token token;
  fill_random(token.data(), token.size());
  return token;
}

std::uint64_t random_u64() {
  std::uint64_t value = 0;
  fill_random(&value, sizeof value);
  return value;
}

Bytes EndpointDescriptor::encode() const {
  ByteWriter writer;
  writer.put(kMagic);
  writer.put(kVersion);
  writer.put_string(backend);
  writer.put(incarnation);
  writer.put_bytes({reinterpret_cast<const char*>(token.data()), token.size()});
  writer.put_string(host);
  writer.put(port);
  writer.put(lanes);
  writer.put_string(blob);
  return writer.take();
}

EndpointDescriptor EndpointDescriptor::decode(std::string_view bytes) {
  ByteReader reader(bytes);
  EndpointDescriptor descriptor;
  if (reader.get<std::uint32_t>("magic") != kMagic) throw FormatError("not an endpoint descriptor");
  const auto version = reader.get<std::uint16_t>("version");
  if (version != kVersion) {
    throw FormatError("of version " + std::to_string(version) + "; this engine speaks version " +
                      std::to_string(kVersion));
  }
  descriptor.backend = reader.get_string("backend name");
  descriptor.incarnation = reader.get<std::uint64_t>("incarnation");
  const std::string_view token = reader.get_bytes(sizeof(Token), "token");
  std::copy(token.begin(), token.end(), descriptor.token.begin());
  descriptor.host = reader.get_string("host");
  descriptor.port = reader.get<std::uint16_t>("port");
  descriptor.lanes = reader.get<std::uint8_t>("number of lanes");
  descriptor.blob = reader.get_string("backend part");
  reader.expect_end();
  return descriptor;
}

}  // namespace rkv
