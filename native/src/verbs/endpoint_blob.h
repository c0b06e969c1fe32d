// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <vector>

#include "core/backend.h"
#include "core/types.h"
#include "verbs/queue_pair.h"
#include "verbs/rail_pairs.h"
#include "verbs/region_keys.h"

namespace rkv::verbs {

/// One rail of an endpoint: where it is, and its QPs for this one peer.
struct RailEndpoint {
  RailAddress address;
  std::vector<QpAddress> qps = {};
};

/// The backend's part of an endpoint's descriptor.
[[nodiscard]] Bytes encode_endpoint(const std::vector<RailEndpoint>& rails);
/// @throw FormatError naming what is wrong.
[[nodiscard]] std::vector<RailEndpoint> decode_endpoint(std::string_view bytes);

/// Keys of the peer's memory, by its rail, of which the endpoint has `rails`.
/// @throw FormatError naming the region and what is wrong: also chunks shorter than the slices that
/// will be written, of `block_size`, as one would need more WRs than kMaxWrsPerSlice.
[[nodiscard]] std::vector<KeysByRegion> decode_memory(const std::vector<RemoteMemory>& memory,
                                                      std::size_t rails, std::uint64_t block_size);

}  // namespace rkv::verbs
