// SPDX-License-Identifier: Apache-2.0
/// Devices, PDs, MRs, CQs and SRQs, and the table. What is in use is not destroyed: EBUSY, as the
/// kernel answers (ib_dealloc_pd, ib_destroy_cq, ib_destroy_srq count their users).
#include "fake_objects.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace rkv::verbs {
namespace fake {
namespace {

const char* get_device_name(ibv_device* device) { return device->name; }

/// What ibv_query_port() fills in. `length` is shorter for callers of its old form.
int query_port(ibv_context* base, std::uint8_t port, ibv_port_attr* out, std::size_t length) {
  if (port != 1) return EINVAL;
  Device& device = device_of(base);
  const std::lock_guard lock(device.fabric->mutex);
  ibv_port_attr attr{};
  attr.state = device.port_up ? IBV_PORT_ACTIVE : IBV_PORT_DOWN;
  attr.max_mtu = IBV_MTU_4096;
  attr.active_mtu = device.options.active_mtu;
  attr.gid_tbl_len = static_cast<int>(device.options.gids.size());
  attr.max_msg_sz = device.options.max_msg_sz;
  attr.pkey_tbl_len = 1;
  attr.lid = device.options.lid;
  attr.active_width = 2;                     // 4x
  attr.active_speed = 32;                    // EDR: 25 Gb/s a lane
  attr.phys_state = device.port_up ? 5 : 3;  // LinkUp, Disabled
  attr.link_layer = device.options.link_layer;
  std::memcpy(out, &attr, std::min(length, sizeof attr));
  return 0;
}

int query_port_compat(ibv_context* context, std::uint8_t port, _compat_ibv_port_attr* out) {
  return query_port(context, port, reinterpret_cast<ibv_port_attr*>(out),
                    offsetof(ibv_port_attr, flags));
}

ibv_context* open_device(ibv_device* base) {
  auto& device = *static_cast<Device*>(base);
  const std::lock_guard lock(device.fabric->mutex);
  auto* context = new Context();
  context->device = &device;
  context->verbs_context::query_port = query_port;
  context->sz = sizeof(verbs_context);
  context->context.abi_compat = __VERBS_ABI_IS_EXTENDED;
  context->context.device = base;
  context->context.async_fd = context->events.fd();
  context->context.cmd_fd = -1;
  context->context.num_comp_vectors = 2;
  const bool null = device.fabric->options.delivery == FakeDelivery::kNull;
  context->context.ops.post_send = null ? post_send_null : post_send;
  context->context.ops.poll_cq = null ? poll_cq_null : poll_cq;
  context->context.ops.post_recv = post_recv;
  context->context.ops.post_srq_recv = post_srq_recv;
  context->context.ops.req_notify_cq = req_notify_cq;
  device.contexts.push_back(context);
  ++device.fabric->live_objects;
  return &context->context;
}

/// Stricter than libibverbs, which leaves what is still open to the kernel.
int close_device(ibv_context* base) {
  Context& context = context_of(base);
  Device& device = *context.device;
  const std::lock_guard lock(device.fabric->mutex);
  if (context.users > 0) return EBUSY;
  std::erase(device.contexts, &context);
  --device.fabric->live_objects;
  delete &context;
  return 0;
}

int query_device(ibv_context* base, ibv_device_attr* out) {
  const FakeDeviceOptions& options = device_of(base).options;
  *out = {};
  out->max_mr_size = options.max_mr_size;
  out->page_size_cap = 0xfffff000;
  out->max_qp = out->max_cq = out->max_mr = out->max_pd = out->max_srq = 1 << 16;
  out->max_qp_wr = options.max_qp_wr;
  out->max_sge = out->max_sge_rd = out->max_srq_sge = options.max_sge;
  out->max_cqe = options.max_cqe;
  out->max_qp_rd_atom = out->max_qp_init_rd_atom = 16;
  out->max_srq_wr = options.max_srq_wr;
  out->max_pkeys = 1;
  out->phys_port_cnt = 1;
  return 0;
}

ibv_pd* alloc_pd(ibv_context* context) {
  Fabric& fabric = fabric_of(context);
  const std::lock_guard lock(fabric.mutex);
  auto* pd = new Pd();
  pd->context = context;
  ++context_of(context).users;
  ++fabric.live_objects;
  return pd;
}

int dealloc_pd(ibv_pd* base) {
  Fabric& fabric = fabric_of(base->context);
  const std::lock_guard lock(fabric.mutex);
  if (pd_of(base).users > 0) return EBUSY;
  --context_of(base->context).users;
  --fabric.live_objects;
  delete &pd_of(base);
  return 0;
}

/// The errno of a registration, 0 if it is fine.
int check_registration(Device& device, std::size_t length, unsigned int access) {
  if (device.reg_mr_failures > 0) {
    --device.reg_mr_failures;
    return device.reg_mr_error;
  }
  if (length == 0 || length > device.options.max_mr_size) return EINVAL;
  // "If IBV_ACCESS_REMOTE_WRITE or IBV_ACCESS_REMOTE_ATOMIC is set, then IBV_ACCESS_LOCAL_WRITE
  // must be set too", ibv_reg_mr(3).
  if ((access & (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC)) != 0 &&
      (access & IBV_ACCESS_LOCAL_WRITE) == 0) {
    return EINVAL;
  }
  const bool relaxed = (access & IBV_ACCESS_RELAXED_ORDERING) != 0;
  return relaxed && device.fabric->options.refuse_relaxed_ordering ? EINVAL : 0;
}

ibv_mr* reg_mr_iova2(ibv_pd* pd, void* address, std::size_t length, std::uint64_t iova,
                     unsigned int access) {
  Device& device = device_of(pd->context);
  const std::lock_guard lock(device.fabric->mutex);
  if (const int error = check_registration(device, length, access)) {
    return fail_with<ibv_mr>(error);
  }
  auto* mr = new Mr();
  mr->context = pd->context;
  mr->pd = pd;
  mr->addr = address;
  mr->length = length;
  mr->handle = device.next_mr++;
  // Different, so that taking one for the other fails: the specification lets them differ.
  mr->lkey = mr->handle << 8 | 1U;
  mr->rkey = mr->handle << 8 | 2U;
  mr->iova = iova;
  mr->access = access;
  device.mrs.emplace(mr->handle, mr);
  ++pd_of(pd).users;
  ++device.fabric->live_objects;
  return mr;
}

ibv_mr* reg_mr(ibv_pd* pd, void* address, std::size_t length, int access) {
  return reg_mr_iova2(pd, address, length, reinterpret_cast<std::uintptr_t>(address),
                      static_cast<unsigned int>(access));
}

int dereg_mr(ibv_mr* base) {
  Device& device = device_of(base->context);
  const std::lock_guard lock(device.fabric->mutex);
  device.mrs.erase(base->handle);
  --pd_of(base->pd).users;
  --device.fabric->live_objects;
  delete static_cast<Mr*>(base);
  return 0;
}

ibv_cq* create_cq(ibv_context* context, int cqe, void* cq_context, ibv_comp_channel* channel,
                  int comp_vector) {
  Device& device = device_of(context);
  const std::lock_guard lock(device.fabric->mutex);
  if (cqe < 1 || cqe > device.options.max_cqe || comp_vector < 0 ||
      comp_vector >= context->num_comp_vectors) {
    return fail_with<ibv_cq>(EINVAL);
  }
  auto* cq = new Cq();
  cq->context = context;
  cq->channel = channel;
  cq->cq_context = cq_context;
  cq->cqe = cqe;
  cq->ring.resize(static_cast<std::size_t>(cqe));
  if (channel != nullptr) ++channel->refcnt;
  ++context_of(context).users;
  ++device.fabric->live_objects;
  return cq;
}

int destroy_cq(ibv_cq* base) {
  Fabric& fabric = fabric_of(base->context);
  std::unique_lock lock(fabric.mutex);
  Cq& cq = cq_of(base);
  if (cq.users > 0) return EBUSY;
  settle_events(cq, lock);
  if (cq.channel != nullptr) --cq.channel->refcnt;
  --context_of(cq.context).users;
  --fabric.live_objects;
  delete &cq;
  return 0;
}

ibv_srq* create_srq(ibv_pd* pd, ibv_srq_init_attr* init) {
  Device& device = device_of(pd->context);
  const std::lock_guard lock(device.fabric->mutex);
  if (init->attr.max_wr < 1 ||
      init->attr.max_wr > static_cast<unsigned>(device.options.max_srq_wr) ||
      init->attr.max_sge > static_cast<unsigned>(device.options.max_sge)) {
    return fail_with<ibv_srq>(EINVAL);
  }
  auto* srq = new Srq();
  srq->context = pd->context;
  srq->srq_context = init->srq_context;
  srq->pd = pd;
  srq->receives.capacity = init->attr.max_wr;
  ++pd_of(pd).users;
  ++device.fabric->live_objects;
  return srq;
}

int destroy_srq(ibv_srq* base) {
  Fabric& fabric = fabric_of(base->context);
  const std::lock_guard lock(fabric.mutex);
  if (srq_of(base).users > 0) return EBUSY;
  --pd_of(base->pd).users;
  --fabric.live_objects;
  delete &srq_of(base);
  return 0;
}

}  // namespace
}  // namespace fake

const Ibverbs& FakeFabric::table() {
  static constexpr Ibverbs kTable{
      .get_device_list = fake::get_device_list,
      .free_device_list = fake::free_device_list,
      .get_device_name = fake::get_device_name,
      .open_device = fake::open_device,
      .close_device = fake::close_device,
      .query_device = fake::query_device,
      .query_port_compat = fake::query_port_compat,
      .get_async_event = fake::get_async_event,
      .ack_async_event = fake::ack_async_event,
      .alloc_pd = fake::alloc_pd,
      .dealloc_pd = fake::dealloc_pd,
      .reg_mr = fake::reg_mr,
      .reg_mr_iova2 = fake::reg_mr_iova2,
      .reg_dmabuf_mr = nullptr,
      .dereg_mr = fake::dereg_mr,
      .create_comp_channel = fake::create_comp_channel,
      .destroy_comp_channel = fake::destroy_comp_channel,
      .create_cq = fake::create_cq,
      .destroy_cq = fake::destroy_cq,
      .get_cq_event = fake::get_cq_event,
      .ack_cq_events = fake::ack_cq_events,
      .create_srq = fake::create_srq,
      .destroy_srq = fake::destroy_srq,
      .create_qp = fake::create_qp,
      .modify_qp = fake::modify_qp,
      .destroy_qp = fake::destroy_qp,
      .wc_status_str = fake::wc_status_str,
      .event_type_str = fake::event_type_str,
      .memlock_limit = [] { return std::uint64_t{UINT64_MAX}; },
  };
  return kTable;
}

}  // namespace rkv::verbs
