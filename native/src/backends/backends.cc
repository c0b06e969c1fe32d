// SPDX-License-Identifier: Apache-2.0
#include "backends/backends.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

#include "tcp/tcp_backend.h"

namespace rkv {
namespace {

/// A shared library opened for the time of a probe.
class Library {
 public:
  explicit Library(const char* file) : handle_(dlopen(file, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) error_ = dlerror();
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  ~Library() {
    if (handle_ != nullptr) dlclose(handle_);
  }
  [[nodiscard]] const std::string& error() const { return error_; }
  template <class Function>
  [[nodiscard]] Function* symbol(const char* name) const {
    return reinterpret_cast<Function*>(handle_ == nullptr ? nullptr : dlsym(handle_, name));
  }

 private:
  void* handle_;
  std::string error_;
};

BackendInfo probe_verbs() {
  const Library library("libibverbs.so.1");
  if (!library.error().empty()) {
    return {"verbs", false, library.error() + "; install rdma-core (Debian, Ubuntu: libibverbs1)"};
  }
  auto* get_device_list = library.symbol<void**(int*)>("ibv_get_device_list");
  auto* free_device_list = library.symbol<void(void**)>("ibv_free_device_list");
  if (get_device_list == nullptr || free_device_list == nullptr) {
    return {"verbs", false, "libibverbs.so.1 lacks ibv_get_device_list"};
  }
  int devices = 0;
  if (void** list = get_device_list(&devices)) free_device_list(list);
  return {"verbs", false,
          "found " + std::to_string(devices) +
              " RDMA devices, but this build has no verbs backend yet"};
}

BackendInfo probe_cuda_ipc() {
  const Library library("libcuda.so.1");
  if (!library.error().empty()) {
    return {"cuda_ipc", false, library.error() + "; install the NVIDIA driver"};
  }
  auto* init = library.symbol<int(unsigned)>("cuInit");
  auto* count_devices = library.symbol<int(int*)>("cuDeviceGetCount");
  if (init == nullptr || count_devices == nullptr) {
    return {"cuda_ipc", false, "libcuda.so.1 lacks cuInit"};
  }
  int devices = 0;
  if (const int status = init(0); status != 0) {
    return {"cuda_ipc", false, "cuInit: CUresult " + std::to_string(status)};
  }
  if (const int status = count_devices(&devices); status != 0) {
    return {"cuda_ipc", false, "cuDeviceGetCount: CUresult " + std::to_string(status)};
  }
  return {"cuda_ipc", false,
          "found " + std::to_string(devices) + " GPUs, but this build has no cuda_ipc backend yet"};
}

}  // namespace

std::vector<BackendInfo> probe_backends() {
  return {probe_verbs(), probe_cuda_ipc(), {"tcp", true, "plain sockets; host memory only"}};
}

std::unique_ptr<Backend> create_backend(const EngineConfig& config) {
  if (config.backend == "auto" || config.backend == "tcp") {
    return std::make_unique<tcp::TcpBackend>(static_cast<std::uint8_t>(config.qps_per_peer));
  }
  std::string names = "auto";
  for (const BackendInfo& info : probe_backends()) {
    if (info.name == config.backend) {
      throw std::runtime_error("backend '" + info.name + "' is not usable: " + info.reason);
    }
    names += ", " + info.name;
  }
  throw std::invalid_argument("backend is '" + config.backend + "'; it must be one of " + names);
}

}  // namespace rkv
