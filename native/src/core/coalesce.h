// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/types.h"

namespace rkv {

/// Joins neighbouring rows that are adjacent on both sides within one region each, and cuts the
/// runs into slices of at most `block_size` bytes. Row order is kept, empty rows are dropped.
///
/// Contiguous KV blocks thus cost one operation instead of one a block, which is what transfer
/// time of small blocks is made of.
class Coalescer {
 public:
  /// Appends to `slices`, which must outlive it.
  Coalescer(std::uint64_t block_size, std::vector<WriteSlice>& slices)
      : block_size_(block_size), slices_(slices) {}

  void add(const WriteSlice& row) {
    if (row.nbytes == 0) return;
    if (continues(row)) {
      run_.nbytes += row.nbytes;
      return;
    }
    finish();
    run_ = row;
  }

  /// Appends what is left.
  void finish() {
    while (run_.nbytes > 0) {
      slices_.push_back(run_);
      const std::uint64_t nbytes = std::min(run_.nbytes, block_size_);
      slices_.back().nbytes = nbytes;
      run_.local_address += nbytes;
      run_.remote_address += nbytes;
      run_.nbytes -= nbytes;
    }
  }

 private:
  [[nodiscard]] bool continues(const WriteSlice& row) const {
    return run_.nbytes > 0 && run_.local_address + run_.nbytes == row.local_address &&
           run_.remote_address + run_.nbytes == row.remote_address &&
           run_.local_region == row.local_region && run_.remote_region == row.remote_region;
  }

  std::uint64_t block_size_;
  std::vector<WriteSlice>& slices_;
  WriteSlice run_;
};

}  // namespace rkv
