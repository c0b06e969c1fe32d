// SPDX-License-Identifier: Apache-2.0
#include "core/marks.h"

#include <stdexcept>

namespace rkv {

Mark NoMarks::mark(std::uintptr_t /*stream*/) {
  throw std::runtime_error("mark(): this engine found no GPU whose streams it could mark");
}

}  // namespace rkv
