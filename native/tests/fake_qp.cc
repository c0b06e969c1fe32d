// SPDX-License-Identifier: Apache-2.0
/// QPs and their states: ibv_create_qp(3), ibv_modify_qp(3), InfiniBand specification 10.3.1.
#include <algorithm>
#include <cerrno>

#include "fake_objects.h"

namespace rkv::verbs::fake {
namespace {

struct Transition {
  ibv_qp_state from;
  ibv_qp_state to;
  int required;
  int optional;
};

/// The RC rows of the kernel's qp_state_table; to RESET and ERR everything may go.
constexpr std::array kTransitions = {
    Transition{IBV_QPS_RESET, IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
               0},
    Transition{IBV_QPS_INIT, IBV_QPS_INIT, 0,
               IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS},
    Transition{IBV_QPS_INIT, IBV_QPS_RTR,
               IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                   IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
               IBV_QP_ALT_PATH | IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX},
    Transition{IBV_QPS_RTR, IBV_QPS_RTS,
               IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                   IBV_QP_MAX_QP_RD_ATOMIC,
               IBV_QP_CUR_STATE | IBV_QP_ALT_PATH | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER |
                   IBV_QP_PATH_MIG_STATE},
    Transition{IBV_QPS_RTS, IBV_QPS_RTS, 0,
               IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_ALT_PATH | IBV_QP_PATH_MIG_STATE |
                   IBV_QP_MIN_RNR_TIMER},
};

bool is_allowed(ibv_qp_state from, ibv_qp_state to, int mask) {
  const int given = mask & ~IBV_QP_STATE;
  if (to == IBV_QPS_RESET || to == IBV_QPS_ERR) return given == 0;
  return std::any_of(kTransitions.begin(), kTransitions.end(), [&](const Transition& row) {
    return row.from == from && row.to == to && (given & row.required) == row.required &&
           (given & ~(row.required | row.optional)) == 0;
  });
}

/// The ranges of the man page's attributes, and what a path on this device needs.
bool are_valid(const Device& device, const ibv_qp_attr& attr, int mask) {
  const auto has = [&](int bit) { return (mask & bit) != 0; };
  if (has(IBV_QP_PORT) && attr.port_num != 1) return false;
  if (has(IBV_QP_PKEY_INDEX) && attr.pkey_index != 0) return false;
  if (has(IBV_QP_PATH_MTU) &&
      (attr.path_mtu < IBV_MTU_256 || attr.path_mtu > device.options.active_mtu)) {
    return false;
  }
  if (has(IBV_QP_DEST_QPN) && attr.dest_qp_num >> 24 != 0) return false;
  if (has(IBV_QP_RQ_PSN) && attr.rq_psn >> 24 != 0) return false;
  if (has(IBV_QP_SQ_PSN) && attr.sq_psn >> 24 != 0) return false;
  if (has(IBV_QP_MIN_RNR_TIMER) && attr.min_rnr_timer > 31) return false;
  if (has(IBV_QP_TIMEOUT) && attr.timeout > 31) return false;
  if (has(IBV_QP_RETRY_CNT) && attr.retry_cnt > 7) return false;
  if (has(IBV_QP_RNR_RETRY) && attr.rnr_retry > 7) return false;
  if (!has(IBV_QP_AV)) return true;
  const ibv_ah_attr& path = attr.ah_attr;
  // RoCE has no LIDs: the kernel's rdma_check_ah_attr() insists on a GRH there.
  if (device.options.link_layer == IBV_LINK_LAYER_ETHERNET && path.is_global == 0) return false;
  return path.port_num == 1 && path.sl <= 15 &&
         (path.is_global == 0 || path.grh.sgid_index < device.options.gids.size());
}

void apply(Qp& qp, const ibv_qp_attr& attr, int mask) {
  const auto has = [&](int bit) { return (mask & bit) != 0; };
  if (has(IBV_QP_ACCESS_FLAGS)) qp.attr.qp_access_flags = attr.qp_access_flags;
  if (has(IBV_QP_AV)) qp.attr.ah_attr = attr.ah_attr;
  if (has(IBV_QP_DEST_QPN)) qp.attr.dest_qp_num = attr.dest_qp_num;
  if (has(IBV_QP_RQ_PSN)) qp.attr.rq_psn = attr.rq_psn;
  if (has(IBV_QP_SQ_PSN)) qp.attr.sq_psn = attr.sq_psn;
  if (has(IBV_QP_MIN_RNR_TIMER)) qp.attr.min_rnr_timer = attr.min_rnr_timer;
  if (has(IBV_QP_TIMEOUT)) qp.attr.timeout = attr.timeout;
  if (has(IBV_QP_RETRY_CNT)) qp.attr.retry_cnt = attr.retry_cnt;
  if (has(IBV_QP_RNR_RETRY)) qp.attr.rnr_retry = attr.rnr_retry;
}

/// RESET forgets the queues and their CQEs, and nothing completes.
void reset(Qp& qp) {
  purge(cq_of(qp.send_cq), qp);
  purge(cq_of(qp.recv_cq), qp);
  qp.sends.clear();
  qp.receives.wr_ids.clear();
  qp.delivered = 0;
  qp.sq_posted = qp.sq_freed = 0;
  qp.lost_since.reset();
  qp.rnr_since.reset();
  qp.comm_established = false;
  qp.attr = {};
  qp.live_state = IBV_QPS_RESET;
}

bool fits(const FakeDeviceOptions& device, const ibv_qp_cap& cap, bool has_srq) {
  const auto wrs = static_cast<std::uint32_t>(device.max_qp_wr);
  const auto sges = static_cast<std::uint32_t>(device.max_sge);
  if (!has_srq && (cap.max_recv_wr > wrs || cap.max_recv_sge > sges)) return false;
  return cap.max_send_wr <= wrs && cap.max_send_sge <= sges &&
         cap.max_inline_data <= device.max_inline;
}

std::uint32_t take_qpn(Device& device) {
  if (!device.fabric->options.reuse_qpns) return device.next_qpn++;
  std::uint32_t lowest = device.next_qpn;
  while (device.qps.contains(lowest)) ++lowest;
  return lowest;
}

}  // namespace

ibv_qp* create_qp(ibv_pd* pd, ibv_qp_init_attr* init) {
  Device& device = device_of(pd->context);
  const std::lock_guard lock(device.fabric->mutex);
  if (init->qp_type != IBV_QPT_RC || init->send_cq == nullptr || init->recv_cq == nullptr ||
      !fits(device.options, init->cap, init->srq != nullptr)) {
    return fail_with<ibv_qp>(EINVAL);
  }
  // They "are ignored by ibv_create_qp() if the QP is to be associated with an SRQ". Real devices
  // round the others up, which code may not count on.
  if (init->srq != nullptr) init->cap.max_recv_wr = init->cap.max_recv_sge = 0;
  auto* qp = new Qp();
  qp->context = pd->context;
  qp->qp_context = init->qp_context;
  qp->pd = pd;
  qp->send_cq = init->send_cq;
  qp->recv_cq = init->recv_cq;
  qp->srq = init->srq;
  qp->qp_num = take_qpn(device);
  qp->state = IBV_QPS_RESET;
  qp->qp_type = init->qp_type;
  qp->cap = init->cap;
  qp->signal_all = init->sq_sig_all != 0;
  qp->receives.capacity = init->cap.max_recv_wr;
  device.qps.emplace(qp->qp_num, qp);
  ++pd_of(pd).users;
  ++cq_of(qp->send_cq).users;
  ++cq_of(qp->recv_cq).users;
  if (qp->srq != nullptr) ++srq_of(qp->srq).users;
  ++device.fabric->live_objects;
  return qp;
}

int modify_qp(ibv_qp* base, ibv_qp_attr* attr, int mask) {
  Device& device = device_of(base->context);
  const std::lock_guard lock(device.fabric->mutex);
  Qp& qp = qp_of(base);
  const ibv_qp_state to = (mask & IBV_QP_STATE) != 0 ? attr->qp_state : qp.live_state;
  if (!is_allowed(qp.live_state, to, mask) || !are_valid(device, *attr, mask)) return EINVAL;
  apply(qp, *attr, mask);
  if (to == IBV_QPS_RESET) {
    reset(qp);
  } else if (to == IBV_QPS_ERR) {
    enter_error(qp);
  } else {
    qp.live_state = to;
  }
  qp.state = to;
  settle(*device.fabric);
  return 0;
}

int destroy_qp(ibv_qp* base) {
  Device& device = device_of(base->context);
  std::unique_lock lock(device.fabric->mutex);
  Qp& qp = qp_of(base);
  device.qps.erase(qp.qp_num);
  add(device.destroyed, qp.tallies.read());
  settle_events(qp, lock);
  // CQEs of the QP stay in the CQ, as on rxe; mlx5 removes them. Code must bear both.
  forget(cq_of(qp.send_cq), qp);
  --pd_of(qp.pd).users;
  --cq_of(qp.send_cq).users;
  --cq_of(qp.recv_cq).users;
  if (qp.srq != nullptr) --srq_of(qp.srq).users;
  --device.fabric->live_objects;
  delete &qp;
  return 0;
}

}  // namespace rkv::verbs::fake
