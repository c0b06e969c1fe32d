// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <infiniband/verbs.h>

#include <cstdint>
#include <memory>

namespace rkv::verbs {

/// The functions of libibverbs that the engine calls, by their own names. Opened at run time,
/// because a login node may lack the library; tests fill a table of their own.
///
/// Posting and polling are not here: verbs.h dispatches them inline through ibv_context::ops.
struct Ibverbs {
  decltype(&::ibv_get_device_list) get_device_list;
  decltype(&::ibv_free_device_list) free_device_list;
  decltype(&::ibv_get_device_name) get_device_name;
  decltype(&::ibv_open_device) open_device;
  decltype(&::ibv_close_device) close_device;
  decltype(&::ibv_query_device) query_device;
  decltype(&::ibv_query_port) query_port_compat;
  decltype(&::ibv_get_async_event) get_async_event;
  decltype(&::ibv_ack_async_event) ack_async_event;
  decltype(&::ibv_alloc_pd) alloc_pd;
  decltype(&::ibv_dealloc_pd) dealloc_pd;
  decltype(&::ibv_reg_mr) reg_mr;
  decltype(&::ibv_reg_mr_iova2) reg_mr_iova2;    ///< Null before rdma-core 26: no relaxed ordering.
  decltype(&::ibv_reg_dmabuf_mr) reg_dmabuf_mr;  ///< Null before rdma-core 34.
  decltype(&::ibv_dereg_mr) dereg_mr;
  decltype(&::ibv_create_comp_channel) create_comp_channel;
  decltype(&::ibv_destroy_comp_channel) destroy_comp_channel;
  decltype(&::ibv_create_cq) create_cq;
  decltype(&::ibv_destroy_cq) destroy_cq;
  decltype(&::ibv_get_cq_event) get_cq_event;
  decltype(&::ibv_ack_cq_events) ack_cq_events;
  decltype(&::ibv_create_srq) create_srq;
  decltype(&::ibv_destroy_srq) destroy_srq;
  decltype(&::ibv_create_qp) create_qp;
  decltype(&::ibv_modify_qp) modify_qp;
  decltype(&::ibv_destroy_qp) destroy_qp;
  decltype(&::ibv_wc_status_str) wc_status_str;
  decltype(&::ibv_event_type_str) event_type_str;
  /// Bytes that this process may pin: no function of the library, but what ibv_reg_mr() goes by.
  std::uint64_t (*memlock_limit)();

  /// What the inline ibv_query_port() of verbs.h does, without linking to the library.
  int query_port(ibv_context* context, std::uint8_t port, ibv_port_attr* attributes) const;
};

/// Opens libibverbs.so.1 once per process and never closes it.
/// @throw std::runtime_error with what is missing and the package that has it.
[[nodiscard]] const Ibverbs& load_ibverbs();

/// Releases what the library gave. Failures are ignored: a releaser has nobody to tell.
struct Release {
  const Ibverbs* lib = nullptr;

  void operator()(ibv_context* context) const { lib->close_device(context); }
  void operator()(ibv_pd* pd) const { lib->dealloc_pd(pd); }
  void operator()(ibv_mr* mr) const { lib->dereg_mr(mr); }
  void operator()(ibv_comp_channel* channel) const { lib->destroy_comp_channel(channel); }
  void operator()(ibv_cq* cq) const { lib->destroy_cq(cq); }
  void operator()(ibv_srq* srq) const { lib->destroy_srq(srq); }
  void operator()(ibv_qp* qp) const { lib->destroy_qp(qp); }
};

template <class T>
using Handle = std::unique_ptr<T, Release>;

}  // namespace rkv::verbs
