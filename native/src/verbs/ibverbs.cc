// SPDX-License-Identifier: Apache-2.0
#include "verbs/ibverbs.h"

#include <dlfcn.h>
#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rkv::verbs {
namespace {

constexpr const char* kLibrary = "libibverbs.so.1";

template <class Function>
void find_optional(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  find_optional(library, name, function);
  if (function == nullptr) {
    throw std::runtime_error(std::string(kLibrary) + " lacks " + name +
                             "; install a newer rdma-core");
  }
}

bool may_lock_any_amount() {
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  std::array<__user_cap_data_struct, _LINUX_CAPABILITY_U32S_3> data{};
  if (syscall(SYS_capget, &header, data.data()) != 0) return false;
  return (data[0].effective & (1U << CAP_IPC_LOCK)) != 0;
}

/// RLIMIT_MEMLOCK binds whoever lacks CAP_IPC_LOCK (getrlimit(2)).
std::uint64_t memlock_limit() {
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  return may_lock_any_amount() ? UINT64_MAX : limit.rlim_cur;
}

/// A fork() gives the child the pinned pages and the parent copies, unless the kernel copies them
/// for the child (Linux 5.12) or this is called first (ibv_fork_init(3)); then it costs nothing.
void make_fork_safe(void* library) {
  decltype(&::ibv_fork_init) fork_init = nullptr;
  find_optional(library, "ibv_fork_init", fork_init);
  if (fork_init != nullptr) fork_init();
}

Ibverbs open_library() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error(std::string(dlerror()) +
                             "; install rdma-core (Debian, Ubuntu: libibverbs1 ibverbs-providers)");
  }
  Ibverbs lib{};
  find(library, "ibv_get_device_list", lib.get_device_list);
  find(library, "ibv_free_device_list", lib.free_device_list);
  find(library, "ibv_get_device_name", lib.get_device_name);
  find(library, "ibv_open_device", lib.open_device);
  find(library, "ibv_close_device", lib.close_device);
  find(library, "ibv_query_device", lib.query_device);
  find(library, "ibv_query_port", lib.query_port_compat);
  find(library, "ibv_get_async_event", lib.get_async_event);
  find(library, "ibv_ack_async_event", lib.ack_async_event);
  find(library, "ibv_alloc_pd", lib.alloc_pd);
  find(library, "ibv_dealloc_pd", lib.dealloc_pd);
  find(library, "ibv_reg_mr", lib.reg_mr);
  find_optional(library, "ibv_reg_mr_iova2", lib.reg_mr_iova2);
  find_optional(library, "ibv_reg_dmabuf_mr", lib.reg_dmabuf_mr);
  find(library, "ibv_dereg_mr", lib.dereg_mr);
  find(library, "ibv_create_comp_channel", lib.create_comp_channel);
  find(library, "ibv_destroy_comp_channel", lib.destroy_comp_channel);
  find(library, "ibv_create_cq", lib.create_cq);
  find(library, "ibv_destroy_cq", lib.destroy_cq);
  find(library, "ibv_get_cq_event", lib.get_cq_event);
  find(library, "ibv_ack_cq_events", lib.ack_cq_events);
  find(library, "ibv_create_srq", lib.create_srq);
  find(library, "ibv_destroy_srq", lib.destroy_srq);
  find(library, "ibv_create_qp", lib.create_qp);
  find(library, "ibv_modify_qp", lib.modify_qp);
  find(library, "ibv_destroy_qp", lib.destroy_qp);
  find(library, "ibv_wc_status_str", lib.wc_status_str);
  find(library, "ibv_event_type_str", lib.event_type_str);
  lib.memlock_limit = memlock_limit;
  make_fork_safe(library);
  return lib;
}

}  // namespace

int Ibverbs::query_port(ibv_context* context, std::uint8_t port, ibv_port_attr* attributes) const {
  if (const verbs_context* extended = verbs_get_ctx(context);
      extended != nullptr && extended->query_port != nullptr) {
    return extended->query_port(context, port, attributes, sizeof *attributes);
  }
  std::memset(attributes, 0, sizeof *attributes);
  return query_port_compat(context, port, reinterpret_cast<_compat_ibv_port_attr*>(attributes));
}

const Ibverbs& load_ibverbs() {
  static const Ibverbs lib = open_library();
  return lib;
}

}  // namespace rkv::verbs
