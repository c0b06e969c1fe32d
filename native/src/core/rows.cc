// SPDX-License-Identifier: Apache-2.0
#include "core/rows.h"

#include <stdexcept>
#include <string>

#include "core/coalesce.h"

namespace rkv {
namespace {

[[noreturn]] void throw_bad_row(std::size_t row, const std::string& what) {
  throw std::invalid_argument("write(): row " + std::to_string(row) + ": " + what);
}

}  // namespace

void slice_rows(const Rows& rows, const RegionIndex& local_regions,
                const RegionIndex& remote_regions, std::uint64_t block_size,
                std::vector<WriteSlice>& slices) {
  Coalescer coalescer(block_size, slices);
  const RegionIndex::Region* local = nullptr;
  const RegionIndex::Region* remote = nullptr;
  for (std::size_t i = 0; i < rows.nbytes.size(); ++i) {
    if (rows.nbytes[i] < 0) throw_bad_row(i, "nbytes is " + std::to_string(rows.nbytes[i]));
    if (rows.nbytes[i] == 0) continue;
    const auto nbytes = static_cast<std::uint64_t>(rows.nbytes[i]);
    const MemoryRange source{static_cast<std::uint64_t>(rows.local[i]), nbytes};
    const MemoryRange target{static_cast<std::uint64_t>(rows.remote[i]), nbytes};
    local = local_regions.find(source.address, nbytes, local);
    if (local == nullptr) {
      throw_bad_row(i, "local range " + source.text() + " is not inside registered memory (" +
                           local_regions.describe() + ")");
    }
    remote = remote_regions.find(target.address, nbytes, remote);
    if (remote == nullptr) {
      throw_bad_row(i, "remote range " + target.text() + " is not inside the peer's memory (" +
                           remote_regions.describe() + ")");
    }
    coalescer.add({source.address, target.address, nbytes, local->id, remote->id});
  }
  coalescer.finish();
}

}  // namespace rkv
