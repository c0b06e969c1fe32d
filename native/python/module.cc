// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "The native transfer engine: writes of many ranges straight into a peer's memory, then one "
      "signal. Knows addresses and bytes, not models. Every call that can wait releases the GIL.";
  rkv::python::register_types(module);
  rkv::python::register_engine(module);
  rkv::python::register_tools(module);
}
