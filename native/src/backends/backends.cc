// SPDX-License-Identifier: Apache-2.0
#include "backends/backends.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <utility>

#include "backends/routed_backend.h"
#include "cuda/ipc_backend.h"
#include "paced/paced_backend.h"
#include "tcp/tcp_backend.h"
#ifdef RKV_HAVE_VERBS
#include "verbs/verbs_backend.h"
#endif

namespace rkv {
namespace {

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
  try {
    return {"cuda_ipc", true, cuda::current_gpu()->text()};
  } catch (const std::runtime_error& error) {
    return {"cuda_ipc", false, error.what()};
  }
}

std::unique_ptr<Backend> create_tcp(const EngineConfig& config) {
  return std::make_unique<tcp::TcpBackend>(static_cast<std::uint8_t>(config.qps_per_peer));
}

RoutedBackend::Member try_member(std::string name, bool has_hardware,
                                 const std::function<std::unique_ptr<Backend>()>& create) {
  try {
    return {.backend = create(), .name = std::move(name)};
  } catch (const std::runtime_error& error) {
    return {.backend = nullptr,
            .name = std::move(name),
            .missing = error.what(),
            .has_hardware = has_hardware};
  }
}

bool is_filled(const char* folder) {
  std::error_code error;
  return !std::filesystem::is_empty(folder, error) && !error;
}

/// Nothing to choose where only tcp is usable, nor a reason to say "auto" in its place.
std::unique_ptr<Backend> create_automatic(const EngineConfig& config) {
  std::vector<RoutedBackend::Member> members;
  members.push_back(try_member("cuda_ipc", is_filled("/proc/driver/nvidia/gpus"),
                               [] { return std::make_unique<cuda::IpcBackend>(); }));
  members.push_back(try_member("verbs", is_filled("/sys/class/infiniband"),
                               [&] { return create_verbs(config); }));
  members.push_back({.backend = create_tcp(config), .name = "tcp"});
  const auto is_missing = [](const RoutedBackend::Member& member) { return !member.backend; };
  if (std::count_if(members.begin(), members.end(), is_missing) == 2) {
    return std::move(members.back().backend);
  }
  return std::make_unique<RoutedBackend>(std::move(members));
}

std::unique_ptr<Backend> create_unpaced(const EngineConfig& config) {
  if (config.backend == "auto") return create_automatic(config);
  if (config.backend == "verbs") return create_verbs(config);
  if (config.backend == "cuda_ipc") return std::make_unique<cuda::IpcBackend>();
  if (config.backend == "tcp") return create_tcp(config);
  std::string names = "auto";
  for (const BackendInfo& info : probe_backends()) {
    if (info.name == config.backend) {
      throw std::runtime_error("backend '" + info.name + "' is not usable: " + info.reason);
    }
    names += ", " + info.name;
  }
  throw std::invalid_argument("backend is '" + config.backend + "'; it must be one of " + names);
}

}  // namespace

std::vector<BackendInfo> probe_backends() {
  return {probe_verbs(), probe_cuda_ipc(), {"tcp", true, "plain sockets; host memory only"}};
}

std::unique_ptr<Backend> create_backend(const EngineConfig& config) {
  if (config.link.empty()) return create_unpaced(config);
  paced::Link link = paced::parse_link(config.link);  // before anything is opened
  return std::make_unique<paced::PacedBackend>(create_unpaced(config), std::move(link));
}

std::unique_ptr<Marks> create_marks() { return std::make_unique<cuda::StreamMarks>(); }

}  // namespace rkv
