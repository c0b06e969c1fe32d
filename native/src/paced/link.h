// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <string>

namespace rkv::paced {

/// What EngineConfig::link asks for.
struct Link {
  double bytes_per_s = 0;
  std::chrono::nanoseconds latency{};
  std::string text = {};  ///< As the user wrote it.
};

/// "25GB/s", "12.5GB/s+5us", "200MB/s+1ms". Units are decimal: 25GB/s is a 200 Gb/s NIC.
/// @throw std::invalid_argument with the text and what is allowed.
[[nodiscard]] Link parse_link(const std::string& text);

}  // namespace rkv::paced
