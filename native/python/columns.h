// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "core/types.h"

namespace rkv::python {

using Column = pybind11::array_t<std::int64_t, pybind11::array::c_style>;

/// Valid as long as the array. @throw std::invalid_argument unless it has one dimension.
inline std::span<const std::int64_t> column_span(const Column& column, const char* name) {
  if (column.ndim() != 1) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(column.ndim()) +
                                " dimensions; it must have one");
  }
  return {column.data(), static_cast<std::size_t>(column.size())};
}

/// @throw std::invalid_argument naming `call`.
inline MemoryKind memory_kind(const std::string& kind, const std::string& call) {
  if (kind == "host") return MemoryKind::kHost;
  if (kind == "cuda") return MemoryKind::kCuda;
  throw std::invalid_argument(call + ": kind is '" + kind + "'; it must be 'host' or 'cuda'");
}

}  // namespace rkv::python
