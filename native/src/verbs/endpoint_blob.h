// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <vector>

#include "core/types.h"
#include "verbs/queue_pair.h"
#include "verbs/rail_pairs.h"

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

}  // namespace rkv::verbs
