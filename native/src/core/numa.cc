// SPDX-License-Identifier: Apache-2.0
#include "core/numa.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace rkv {

int numa_node(std::uint64_t address) {
  const auto page_bytes = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  void* page = reinterpret_cast<void*>(address & ~(page_bytes - 1));
  int node = -1;
  // Without target nodes move_pages(2) moves nothing and says where the pages are.
  if (syscall(SYS_move_pages, 0, 1UL, &page, nullptr, &node, 0) != 0) return -1;
  return node < 0 ? -1 : node;
}

}  // namespace rkv
