// SPDX-License-Identifier: Apache-2.0
#include "engine_pair.h"

#include <cstring>
#include <numeric>

namespace rkv {

Columns scattered_pages(const Side& from, const Side& to, std::size_t page,
                        std::mt19937_64& random) {
  std::vector<std::size_t> order(from.buffer.size() / page);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  Columns rows;
  for (std::size_t i = 0; i < order.size(); ++i) {
    rows.local.push_back(static_cast<std::int64_t>(from.address(i * page)));
    rows.remote.push_back(static_cast<std::int64_t>(to.address(order[i] * page)));
    rows.nbytes.push_back(static_cast<std::int64_t>(page));
  }
  return rows;
}

void expect_landed(const Columns& rows) {
  for (std::size_t i = 0; i < rows.local.size(); ++i) {
    ASSERT_EQ(std::memcmp(reinterpret_cast<const void*>(rows.local[i]),
                          reinterpret_cast<const void*>(rows.remote[i]),
                          static_cast<std::size_t>(rows.nbytes[i])),
              0)
        << "row " << i;
  }
}

void fill_random(std::vector<unsigned char>& buffer, std::mt19937_64& random) {
  for (std::size_t i = 0; i < buffer.size(); i += sizeof(std::uint64_t)) {
    const std::uint64_t word = random();
    std::memcpy(&buffer[i], &word, std::min(sizeof word, buffer.size() - i));
  }
}

}  // namespace rkv
