// SPDX-License-Identifier: Apache-2.0
#include "core/error.h"

#include <cstring>

namespace rkv {

std::string errno_text(int errnum) {
  const char* name = strerrorname_np(errnum);
  const char* text = strerrordesc_np(errnum);
  if (name == nullptr || text == nullptr) return "errno " + std::to_string(errnum);
  return std::string(name) + " (" + text + ")";
}

std::string call_error(std::string_view call, int errnum, std::string_view remedy) {
  std::string text = std::string(call) + ": " + errno_text(errnum);
  if (!remedy.empty()) text.append("; ").append(remedy);
  return text;
}

void throw_errno(std::string_view call, int errnum, std::string_view remedy) {
  throw std::runtime_error(call_error(call, errnum, remedy));
}

}  // namespace rkv
