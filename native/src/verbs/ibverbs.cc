// SPDX-License-Identifier: Apache-2.0
#include "verbs/ibverbs.h"

#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/shared_library.h"

namespace rkv::verbs {
namespace {

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
void make_fork_safe(const SharedLibrary& library) {
  decltype(&::ibv_fork_init) fork_init = nullptr;
  library.find_optional("ibv_fork_init", fork_init);
  if (fork_init != nullptr) fork_init();
}

Ibverbs open_library() {
  const SharedLibrary library("libibverbs.so.1",
                              "install rdma-core (Debian, Ubuntu: libibverbs1 ibverbs-providers)",
                              "install a newer rdma-core");
  Ibverbs lib{};
  library.find("ibv_get_device_list", lib.get_device_list);
  library.find("ibv_free_device_list", lib.free_device_list);
  library.find("ibv_get_device_name", lib.get_device_name);
  library.find("ibv_open_device", lib.open_device);
  library.find("ibv_close_device", lib.close_device);
  library.find("ibv_query_device", lib.query_device);
  library.find("ibv_query_port", lib.query_port_compat);
  library.find("ibv_get_async_event", lib.get_async_event);
  library.find("ibv_ack_async_event", lib.ack_async_event);
  library.find("ibv_alloc_pd", lib.alloc_pd);
  library.find("ibv_dealloc_pd", lib.dealloc_pd);
  library.find("ibv_reg_mr", lib.reg_mr);
  library.find_optional("ibv_reg_mr_iova2", lib.reg_mr_iova2);
  library.find_optional("ibv_reg_dmabuf_mr", lib.reg_dmabuf_mr);
  library.find("ibv_dereg_mr", lib.dereg_mr);
  library.find("ibv_create_comp_channel", lib.create_comp_channel);
  library.find("ibv_destroy_comp_channel", lib.destroy_comp_channel);
  library.find("ibv_create_cq", lib.create_cq);
  library.find("ibv_destroy_cq", lib.destroy_cq);
  library.find("ibv_get_cq_event", lib.get_cq_event);
  library.find("ibv_ack_cq_events", lib.ack_cq_events);
  library.find("ibv_create_srq", lib.create_srq);
  library.find("ibv_destroy_srq", lib.destroy_srq);
  library.find("ibv_create_qp", lib.create_qp);
  library.find("ibv_modify_qp", lib.modify_qp);
  library.find("ibv_destroy_qp", lib.destroy_qp);
  library.find("ibv_wc_status_str", lib.wc_status_str);
  library.find("ibv_event_type_str", lib.event_type_str);
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
