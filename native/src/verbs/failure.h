// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <infiniband/verbs.h>

#include <string>
#include <string_view>

#include "verbs/send_queue.h"

namespace rkv::verbs {

/// What a WR of this kind is called in texts.
[[nodiscard]] std::string_view name_of(Chain::Kind kind);

/// What usually is behind a completion's status, and what to look at. Statuses: InfiniBand
/// Architecture Specification 1.4, 10.10.3; ibv_poll_cq(3).
[[nodiscard]] std::string_view likely_cause(ibv_wc_status status);

/// A sentence for a completion with an error: "WRITE failed with transport retry counter exceeded
/// (RETRY_EXC_ERR, vendor error 0x81): ...".
[[nodiscard]] std::string completion_error(const ibv_wc& wc, std::string_view what,
                                           std::string_view status_text);

}  // namespace rkv::verbs
