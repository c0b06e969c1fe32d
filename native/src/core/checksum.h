// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace rkv {

/// XXH64 of the bytes, seed 0: a published hash that any other tool can recompute, plain C++ on
/// every CPU, and within a factor of two of memcpy. Detects errors, not attackers.
[[nodiscard]] std::uint64_t checksum64(const void* data, std::size_t nbytes);

}  // namespace rkv
