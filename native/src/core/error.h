// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace rkv {

/// Bytes from outside (a descriptor, a hello, a frame) that are not what they should be.
class FormatError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// "ECONNREFUSED (Connection refused)".
[[nodiscard]] std::string errno_text(int errnum);

/// "bind(10.0.0.1:0): EADDRNOTAVAIL (Cannot assign requested address); <remedy>".
[[nodiscard]] std::string call_error(std::string_view call, int errnum,
                                     std::string_view remedy = {});

/// @throw std::runtime_error with the text of call_error().
[[noreturn]] void throw_errno(std::string_view call, int errnum, std::string_view remedy = {});

}  // namespace rkv
