// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace rkv {

/// A library that a host may lack, opened at run time and never closed.
class SharedLibrary {
 public:
  /// `if_missing` and `if_old`: what to do then. @throw std::runtime_error with the linker's words.
  SharedLibrary(std::string file, const std::string& if_missing, std::string if_old)
      : file_(std::move(file)),
        if_old_(std::move(if_old)),
        handle_(dlopen(file_.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(std::string(dlerror()) + "; " + if_missing);
  }

  /// Sets `function`, to null if the library has none of that name.
  template <class Function>
  void find_optional(const char* name, Function& function) const {
    function = reinterpret_cast<Function>(dlsym(handle_, name));
  }

  /// @throw std::runtime_error naming the function.
  template <class Function>
  void find(const char* name, Function& function) const {
    find_optional(name, function);
    if (function == nullptr) throw std::runtime_error(file_ + " lacks " + name + "; " + if_old_);
  }

 private:
  std::string file_;
  std::string if_old_;
  void* handle_;
};

}  // namespace rkv
