// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace rkv::python {

/// Events, configuration, backend information.
void register_types(pybind11::module_& module);
/// Engine, Endpoint, LocalMemory.
void register_engine(pybind11::module_& module);
/// probe_backends() and checksum().
void register_tools(pybind11::module_& module);

}  // namespace rkv::python
