// SPDX-License-Identifier: Apache-2.0
#include "paced/link.h"

#include <array>
#include <charconv>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace rkv::paced {
namespace {

using Units = std::array<std::pair<std::string_view, double>, 4>;

constexpr Units kRates{{{"kB/s", 1e3}, {"MB/s", 1e6}, {"GB/s", 1e9}, {"TB/s", 1e12}}};
constexpr Units kTimes{{{"ns", 1e-9}, {"us", 1e-6}, {"ms", 1e-3}, {"s", 1}}};
// A slower link would hold one block for longer than any peer timeout.
constexpr double kMinRate = 1e6;
constexpr double kMaxRate = 1e15;
constexpr double kMaxLatency = 10;

[[noreturn]] void refuse(const std::string& text, const std::string& why) {
  throw std::invalid_argument("link is '" + text + "'; " + why +
                              "; write a rate and, if you like, a latency, such as '25GB/s' or "
                              "'12.5GB/s+5us' (kB, MB, GB, TB; ns, us, ms, s)");
}

/// "12.5GB/s" in units of one. @return NaN for what is not a number and one of `units`.
double parse(std::string_view text, const Units& units) {
  double number = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error == std::errc{}) {
    text.remove_prefix(static_cast<std::size_t>(rest - text.data()));
    for (const auto& [name, factor] : units) {
      if (text == name) return number * factor;
    }
  }
  return std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

Link parse_link(const std::string& text) {
  const std::string_view all = text;
  const std::size_t plus = all.find('+');
  const double rate = parse(all.substr(0, plus), kRates);
  // Written so that NaN fails too.
  if (!(rate >= kMinRate && rate <= kMaxRate)) {
    refuse(text, "its rate must be from 1MB/s to 1000TB/s");
  }
  const double latency = plus == std::string_view::npos ? 0 : parse(all.substr(plus + 1), kTimes);
  if (!(latency >= 0 && latency <= kMaxLatency)) {
    refuse(text, "its latency must be from 0us to 10s");
  }
  return {.bytes_per_s = rate,
          .latency =
              std::chrono::round<std::chrono::nanoseconds>(std::chrono::duration<double>(latency)),
          .text = text};
}

}  // namespace rkv::paced
