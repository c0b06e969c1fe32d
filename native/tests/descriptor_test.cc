// SPDX-License-Identifier: Apache-2.0
/// Everything that a peer or an application may hand us as bytes, whole and broken.
#include <gtest/gtest.h>

#include "core/endpoint_descriptor.h"
#include "core/error.h"
#include "core/hello.h"
#include "core/regions.h"

namespace rkv {
namespace {

EndpointDescriptor endpoint() {
  return {.backend = "tcp",
          .incarnation = 42,
          .token = {1, 2, 3},
          .host = "10.0.0.1",
          .port = 4242,
          .lanes = 2,
          .blob = Bytes("\0qpn", 4)};
}

template <class Decode>
std::string refusal(Decode decode, const Bytes& bytes) {
  try {
    (void)decode(bytes);
  } catch (const FormatError& error) {
    return error.what();
  }
  return "";
}

/// Every truncation, an extra byte, another magic and another version are refused by name.
template <class Decode>
void expect_only_whole(Decode decode, const Bytes& bytes) {
  EXPECT_EQ(refusal(decode, bytes), "");
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_NE(refusal(decode, bytes.substr(0, n)).find("truncated"), std::string::npos) << n;
  }
  EXPECT_NE(refusal(decode, bytes + "x").find("1 bytes too long"), std::string::npos);
  Bytes foreign = bytes;
  foreign[0] ^= 1;
  EXPECT_NE(refusal(decode, foreign).find("not a"), std::string::npos);
  Bytes newer = bytes;
  newer[4] ^= 2;
  EXPECT_NE(refusal(decode, newer).find("version 3"), std::string::npos);
}

TEST(EndpointDescriptor, RoundTrips) {
  const EndpointDescriptor decoded = EndpointDescriptor::decode(endpoint().encode());
  EXPECT_EQ(decoded.backend, "tcp");
  EXPECT_EQ(decoded.incarnation, 42U);
  EXPECT_EQ(decoded.token, endpoint().token);
  EXPECT_EQ(decoded.host, "10.0.0.1");
  EXPECT_EQ(decoded.port, 4242);
  EXPECT_EQ(decoded.lanes, 2);
  EXPECT_EQ(decoded.blob, endpoint().blob);
}

TEST(EndpointDescriptor, RefusesWhatIsNotWhole) {
  expect_only_whole(EndpointDescriptor::decode, endpoint().encode());
}

TEST(EndpointDescriptor, ExactlyOneSideDials) {
  EndpointDescriptor a = endpoint();
  EndpointDescriptor b = endpoint();
  b.token = {1, 2, 4};
  EXPECT_TRUE(a.dials(b));
  EXPECT_FALSE(b.dials(a));
  a.incarnation = 43;  // decides before the token
  EXPECT_FALSE(a.dials(b));
  EXPECT_TRUE(b.dials(a));
}

TEST(EndpointDescriptor, TokensAreRandom) { EXPECT_NE(random_token(), random_token()); }

TEST(MemoryDescriptor, RoundTripsAndRefusesWhatIsNotWhole) {
  const MemoryDescriptor memory{
      .backend = "tcp", .incarnation = 42, .range = {0x1000, 0x2000}, .blob = "rkey"};
  const MemoryDescriptor decoded = MemoryDescriptor::decode(memory.encode());
  EXPECT_EQ(decoded.range.address, 0x1000U);
  EXPECT_EQ(decoded.range.nbytes, 0x2000U);
  EXPECT_EQ(decoded.blob, "rkey");
  expect_only_whole(MemoryDescriptor::decode, memory.encode());
}

TEST(MemoryDescriptor, RefusesMemoryThatWraps) {
  const MemoryDescriptor memory{
      .backend = "tcp", .incarnation = 42, .range = {UINT64_MAX - 1, 3}, .blob = ""};
  EXPECT_NE(refusal(MemoryDescriptor::decode, memory.encode()), "");
}

TEST(Hello, HasItsSizeAndRefusesWhatIsNotWhole) {
  const Bytes hello = Hello{.lane = 1, .lanes = 2, .acceptor = {1}, .dialer = {2}}.encode();
  EXPECT_EQ(hello.size(), Hello::kBytes);
  expect_only_whole(Hello::decode, hello);
  const Bytes reply = HelloReply{.dialer = {2}, .acceptor_incarnation = 7}.encode();
  EXPECT_EQ(reply.size(), HelloReply::kBytes);
  expect_only_whole(HelloReply::decode, reply);
}

}  // namespace
}  // namespace rkv
