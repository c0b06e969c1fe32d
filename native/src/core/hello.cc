// SPDX-License-Identifier: Apache-2.0
#include "core/hello.h"

#include <algorithm>

#include "core/wire.h"

namespace rkv {
namespace {

constexpr std::uint32_t kHelloMagic = 0x48564b52;  // "RKVH"
constexpr std::uint32_t kReplyMagic = 0x52564b52;  // "RKVR"
/// Covers everything on the wire: hello, control frames and the backends' own frames.
constexpr std::uint16_t kVersion = 1;

void put_token(ByteWriter& writer, const Token& token) {
  writer.put_bytes({reinterpret_cast<const char*>(token.data()), token.size()});
}

Token get_token(ByteReader& reader, const char* field) {
  const std::string_view bytes = reader.get_bytes(sizeof(Token), field);
  Token token;
  std::copy(bytes.begin(), bytes.end(), token.begin());
  return token;
}

void check_preamble(ByteReader& reader, std::uint32_t magic) {
  if (reader.get<std::uint32_t>("magic") != magic) throw FormatError("not a hello (bad magic)");
  const auto version = reader.get<std::uint16_t>("version");
  if (version != kVersion) {
    throw FormatError("hello of protocol version " + std::to_string(version) +
                      "; this engine speaks version " + std::to_string(kVersion));
  }
}

}  // namespace

Bytes Hello::encode() const {
  ByteWriter writer;
  writer.put(kHelloMagic);
  writer.put(kVersion);
  writer.put(lane);
  writer.put(lanes);
  put_token(writer, acceptor);
  put_token(writer, dialer);
  writer.put(dialer_incarnation);
  return writer.take();
}

Hello Hello::decode(std::string_view bytes) {
  ByteReader reader(bytes);
  check_preamble(reader, kHelloMagic);
  Hello hello;
  hello.lane = reader.get<std::uint8_t>("lane");
  hello.lanes = reader.get<std::uint8_t>("lane count");
  hello.acceptor = get_token(reader, "acceptor token");
  hello.dialer = get_token(reader, "dialer token");
  hello.dialer_incarnation = reader.get<std::uint64_t>("incarnation");
  reader.expect_end();
  return hello;
}

Bytes HelloReply::encode() const {
  ByteWriter writer;
  writer.put(kReplyMagic);
  writer.put(kVersion);
  writer.put(std::uint16_t{0});
  put_token(writer, dialer);
  writer.put(acceptor_incarnation);
  return writer.take();
}

HelloReply HelloReply::decode(std::string_view bytes) {
  ByteReader reader(bytes);
  check_preamble(reader, kReplyMagic);
  (void)reader.get<std::uint16_t>("padding");
  HelloReply reply;
  reply.dialer = get_token(reader, "dialer token");
  reply.acceptor_incarnation = reader.get<std::uint64_t>("incarnation");
  reader.expect_end();
  return reply;
}

}  // namespace rkv
