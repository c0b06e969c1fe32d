// SPDX-License-Identifier: Apache-2.0
#include "core/config.h"

#include <sched.h>

#include <stdexcept>

#include "core/text.h"

namespace rkv {
namespace {

template <class T>
void check_range(const char* field, T value, T lowest, T highest) {
  // Written so that NaN fails too.
  if (value >= lowest && value <= highest) return;
  throw std::invalid_argument(std::string(field) + " is " + number_text(value) +
                              "; it must be from " + number_text(lowest) + " to " +
                              number_text(highest));
}

}  // namespace

void EngineConfig::validate() const {
  check_range<std::int64_t>("block_size", block_size, 4096, 8 << 20);
  check_range<std::int64_t>("queue_depth", queue_depth, 1, 65536);
  check_range<std::int64_t>("qps_per_peer", qps_per_peer, 1, 16);
  check_range<double>("peer_timeout_s", peer_timeout_s, 0.1, 3600.0);
  check_range<double>("connect_timeout_s", connect_timeout_s, 0.1, 3600.0);
  check_range<std::int64_t>("spin_us", spin_us, kAuto, 1000000);
  check_range<std::int64_t>("gid_index", gid_index, kAuto, 255);
  check_range<std::int64_t>("traffic_class", traffic_class, 0, 255);
  check_range<std::int64_t>("service_level", service_level, 0, 15);
  check_range<std::int64_t>("progress_cpu", progress_cpu, kAuto, CPU_SETSIZE - 1);
  if (bind_host.empty() || bind_host == "0.0.0.0" || bind_host == "::") {
    throw std::invalid_argument("bind_host is '" + bind_host +
                                "'; it must be one address that peers can reach, not a wildcard");
  }
}

}  // namespace rkv
