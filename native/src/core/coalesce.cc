// SPDX-License-Identifier: Apache-2.0
#include "core/coalesce.h"

#include <algorithm>

namespace rkv {
namespace {

bool continues(const WriteSlice& run, const WriteSlice& row) {
  return run.local_address + run.nbytes == row.local_address &&
         run.remote_address + run.nbytes == row.remote_address &&
         run.local_region == row.local_region && run.remote_region == row.remote_region;
}

void append_slices(WriteSlice run, std::uint64_t block_size, std::vector<WriteSlice>& slices) {
  while (run.nbytes > 0) {
    WriteSlice slice = run;
    slice.nbytes = std::min(run.nbytes, block_size);
    slices.push_back(slice);
    run.local_address += slice.nbytes;
    run.remote_address += slice.nbytes;
    run.nbytes -= slice.nbytes;
  }
}

}  // namespace

std::vector<WriteSlice> coalesce_and_slice(std::span<const WriteSlice> rows,
                                           std::uint64_t block_size) {
  std::vector<WriteSlice> slices;
  slices.reserve(rows.size());
  WriteSlice run;
  for (const WriteSlice& row : rows) {
    if (row.nbytes == 0) continue;
    if (run.nbytes > 0 && continues(run, row)) {
      run.nbytes += row.nbytes;
    } else {
      append_slices(run, block_size, slices);
      run = row;
    }
  }
  append_slices(run, block_size, slices);
  return slices;
}

}  // namespace rkv
