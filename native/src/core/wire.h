// SPDX-License-Identifier: Apache-2.0
/// Fixed-width little-endian fields: the encoding of descriptors, hellos and frames.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "core/error.h"
#include "core/types.h"

namespace rkv {

static_assert(std::endian::native == std::endian::little, "fields are copied, not swapped");

class ByteWriter {
 public:
  template <std::unsigned_integral T>
  void put(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put_bytes(std::string_view raw) { bytes_.append(raw); }
  /// A u16 length, then the bytes. @throw FormatError beyond 65,535 bytes.
  void put_string(std::string_view text) {
    if (text.size() > UINT16_MAX) throw FormatError("a field of a descriptor exceeds 65535 bytes");
    put(static_cast<std::uint16_t>(text.size()));
    put_bytes(text);
  }
  [[nodiscard]] Bytes take() { return std::move(bytes_); }

 private:
  Bytes bytes_;
};

/// Reads what ByteWriter wrote; every getter names its field when the bytes end early.
class ByteReader {
 public:
  explicit ByteReader(std::string_view bytes) : rest_(bytes) {}

  template <std::unsigned_integral T>
  [[nodiscard]] T get(const char* field) {
    T value;
    std::memcpy(&value, get_bytes(sizeof value, field).data(), sizeof value);
    return value;
  }
  [[nodiscard]] std::string_view get_bytes(std::size_t n, const char* field) {
    if (rest_.size() < n) throw FormatError(std::string("truncated at its ") + field);
    const std::string_view bytes = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return bytes;
  }
  [[nodiscard]] std::string get_string(const char* field) {
    return std::string(get_bytes(get<std::uint16_t>(field), field));
  }
  void expect_end() const {
    if (!rest_.empty()) throw FormatError(std::to_string(rest_.size()) + " bytes too long");
  }

 private:
  std::string_view rest_;
};

}  // namespace rkv
