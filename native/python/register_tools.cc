// SPDX-License-Identifier: Apache-2.0
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "backends/backends.h"
#include "bindings.h"
#include "columns.h"
#include "core/checksum.h"
#include "core/numa.h"
#include "cuda/read.h"

namespace py = pybind11;

namespace rkv::python {
namespace {

py::array_t<std::uint64_t> checksum(const Column& addresses, const Column& nbytes,
                                    const std::string& kind) {
  const auto address = column_span(addresses, "addresses");
  const auto length = column_span(nbytes, "nbytes");
  if (address.size() != length.size()) {
    throw std::invalid_argument("checksum(): addresses and nbytes differ in length");
  }
  for (std::size_t i = 0; i < length.size(); ++i) {
    if (length[i] < 0 || (address[i] == 0 && length[i] > 0)) {
      throw std::invalid_argument("checksum(): row " + std::to_string(i) + " is no memory");
    }
  }
  py::array_t<std::uint64_t> sums(static_cast<py::ssize_t>(address.size()));
  std::uint64_t* sum = sums.mutable_data();
  const bool is_cuda = memory_kind(kind, "checksum()") == MemoryKind::kCuda;
  const py::gil_scoped_release release;
  if (is_cuda) {
    std::ranges::copy(cuda::checksum(address, length), sum);
    return sums;
  }
  for (std::size_t i = 0; i < address.size(); ++i) {
    const auto* data = reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address[i]));
    sum[i] = checksum64(data, static_cast<std::size_t>(length[i]));
  }
  return sums;
}

}  // namespace

void register_tools(py::module_& module) {
  module.def("probe_backends", &probe_backends, py::call_guard<py::gil_scoped_release>(),
             "What this host offers to each backend, best first.");
  module.def(
      "checksum", &checksum, py::arg("addresses").noconvert(), py::arg("nbytes").noconvert(),
      py::arg("kind") = "host",
      "XXH64 (seed 0) of each range of this process's memory, which is 'host' or 'cuda'.\n\n"
      "Two int64 arrays of shape (n,): addresses and bytes; returns uint64 of shape (n,). "
      "The memory must be mapped: host addresses are not checked. GPU memory is read without "
      "waiting for any stream. Raises RuntimeError with the driver's error.");
  module.def("numa_node", &numa_node, py::arg("address"),
             "NUMA node of the page at `address`; -1 if it was never touched or none is known.");
}

}  // namespace rkv::python
