// SPDX-License-Identifier: Apache-2.0
#include "backends/backends.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

#include "tcp/tcp_backend.h"
#ifdef RKV_HAVE_VERBS
#include "verbs/verbs_backend.h"
#endif

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

#ifdef RKV_HAVE_VERBS

verbs::Choice choose_verbs_ports(const EngineConfig& config) {
  return verbs::choose_ports(verbs::read_host(), {.devices = config.devices,
                                                  .gid_index = static_cast<int>(config.gid_index),
                                                  .near = config.near});
}

BackendInfo probe_verbs() {
  try {
    (void)verbs::load_ibverbs();
    return {"verbs", true, choose_verbs_ports({}).text()};
  } catch (const std::runtime_error& error) {
    return {"verbs", false, error.what()};
  }
}

std::unique_ptr<Backend> create_verbs(const EngineConfig& config) {
  return std::make_unique<verbs::VerbsBackend>(config, verbs::load_ibverbs(),
                                               choose_verbs_ports(config));
}

#else

constexpr const char* kNoVerbs =
    "built without rdma-core's headers; install them (Debian, Ubuntu: libibverbs-dev; RHEL: "
    "rdma-core-devel) and build again";

BackendInfo probe_verbs() { return {"verbs", false, kNoVerbs}; }

std::unique_ptr<Backend> create_verbs(const EngineConfig& /*config*/) {
  throw std::runtime_error(std::string("backend 'verbs' is not usable: ") + kNoVerbs);
}

#endif

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
  const bool automatic = config.backend == "auto";
  if (config.backend == "verbs" || (automatic && probe_verbs().usable)) return create_verbs(config);
  if (config.backend == "tcp" || automatic) {
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
