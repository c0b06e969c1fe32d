// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace rkv::cuda {

/// XXH64 (seed 0) of ranges of GPU memory, read through the host. Does not wait for other streams:
/// the bytes must be final. @throw std::runtime_error
[[nodiscard]] std::vector<std::uint64_t> checksum(std::span<const std::int64_t> addresses,
                                                  std::span<const std::int64_t> nbytes);

}  // namespace rkv::cuda
