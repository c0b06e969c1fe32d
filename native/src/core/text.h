// SPDX-License-Identifier: Apache-2.0
/// Numbers for texts. Not by streams: in a process that loaded another copy of libstdc++ than the
/// one this is linked to, as plug-ins of Python are at times, their locale facets do not fit.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <string>

namespace rkv {

/// "0x7f00".
[[nodiscard]] inline std::string hex_text(std::uint64_t value) {
  std::array<char, 20> text{};
  std::snprintf(text.data(), text.size(), "0x%llx", static_cast<unsigned long long>(value));
  return text.data();
}

/// "0.1", "3600".
[[nodiscard]] inline std::string number_text(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%g", value);
  return text.data();
}
[[nodiscard]] inline std::string number_text(std::int64_t value) { return std::to_string(value); }

}  // namespace rkv
