// SPDX-License-Identifier: Apache-2.0
/// The transport of an RC QP, requester and responder: InfiniBand specification 9.7 and 9.9.
#include <algorithm>
#include <cstring>
#include <utility>

#include "fake_objects.h"

namespace rkv::verbs::fake {
namespace {

enum class Outcome : std::uint8_t { kDelivered, kLost, kReceiverNotReady, kFailed };

struct Attempt {
  Outcome outcome;
  ibv_wc_status status = IBV_WC_SUCCESS;
};

Attempt failed(ibv_wc_status status) { return {Outcome::kFailed, status}; }

/// The device an address vector leads to; null if there is none.
Device* find_device(Fabric& fabric, const ibv_ah_attr& path) {
  for (Device& device : fabric.devices) {
    if (path.is_global == 0) {
      if (path.dlid != 0 && device.options.lid == path.dlid) return &device;
      continue;
    }
    const std::vector<ibv_gid>& gids = device.options.gids;
    if (std::any_of(gids.begin(), gids.end(), [&](const ibv_gid& gid) {
          return std::memcmp(gid.raw, path.grh.dgid.raw, sizeof gid.raw) == 0;
        })) {
      return &device;
    }
  }
  return nullptr;
}

bool sends(const Device& device) { return device.port_up && !device.stalled && !device.dropping; }
bool receives(const Device& device) { return device.port_up && !device.stalled; }

/// The responder a request of this QP reaches now. A responder drops without a word what does not
/// come from its peer, what comes in a state that takes no requests, and what is out of sequence.
Qp* find_responder(Fabric& fabric, Qp& qp) {
  Device& own = device_of(qp.context);
  Device* device = find_device(fabric, qp.attr.ah_attr);
  if (device == nullptr || !sends(own) || !receives(*device)) return nullptr;
  const auto found = device->qps.find(qp.attr.dest_qp_num);
  if (found == device->qps.end()) return nullptr;
  Qp& peer = *found->second;
  const bool takes_requests = peer.live_state == IBV_QPS_RTR || peer.live_state == IBV_QPS_RTS;
  return takes_requests && peer.attr.dest_qp_num == qp.qp_num &&
                 find_device(fabric, peer.attr.ah_attr) == &own &&
                 peer.attr.rq_psn == qp.attr.sq_psn
             ? &peer
             : nullptr;
}

bool acks_arrive(Fabric& fabric, Qp& qp) {
  const Device* device = find_device(fabric, qp.attr.ah_attr);
  return device != nullptr && sends(*device) && receives(device_of(qp.context));
}

/// The MR of a key of this QP's PD; null if the key is of none.
const Mr* find_mr(const Qp& qp, std::uint32_t key) {
  const std::map<std::uint32_t, Mr*>& mrs = device_of(qp.context).mrs;
  const auto found = mrs.find(key >> 8);
  if (found == mrs.end() || found->second->pd != qp.pd) return nullptr;
  return found->second;
}

/// Zero-length SGEs are not checked: they name no memory.
bool is_readable(const Qp& qp, const ibv_sge& sge) {
  if (sge.length == 0) return true;
  const Mr* mr = find_mr(qp, sge.lkey);
  return mr != nullptr && mr->lkey == sge.lkey && mr->at(sge.addr, sge.length) != nullptr;
}

/// Where the WR may write; null for a remote access error.
std::byte* writable(const Qp& responder, const SendWr& wr) {
  const Mr* mr = find_mr(responder, wr.rkey);
  if (mr == nullptr || mr->rkey != wr.rkey || (mr->access & IBV_ACCESS_REMOTE_WRITE) == 0) {
    return nullptr;
  }
  return mr->at(wr.remote_addr, wr.length);
}

void copy(const Qp& qp, const SendWr& wr, std::byte* to) {
  if (!wr.inlined.empty()) std::memcpy(to, wr.inlined.data(), wr.inlined.size());
  for (const ibv_sge& sge : wr.sges) {
    if (sge.length == 0) continue;
    std::memmove(to, find_mr(qp, sge.lkey)->at(sge.addr, sge.length), sge.length);
    to += sge.length;
  }
}

/// The responder's checks in the specification's order (9.7.4): opcode, receive resources, R_Key.
Attempt respond(Qp& qp, const SendWr& wr, Qp& responder) {
  const bool writes = wr.opcode == IBV_WR_RDMA_WRITE || wr.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
  if (responder.live_state == IBV_QPS_RTR && !responder.comm_established) {
    responder.comm_established = true;
    raise_event(responder, IBV_EVENT_COMM_EST);
  }
  if (writes && (responder.attr.qp_access_flags & IBV_ACCESS_REMOTE_WRITE) == 0) {
    raise_event(responder, IBV_EVENT_QP_REQ_ERR);
    enter_error(responder);
    return failed(IBV_WC_REM_INV_REQ_ERR);
  }
  const bool consumes = wr.opcode != IBV_WR_RDMA_WRITE;
  if (consumes && receives_of(responder).wr_ids.empty()) return {Outcome::kReceiverNotReady};
  if (writes && wr.length > 0) {
    std::byte* to = writable(responder, wr);
    if (to == nullptr) {
      raise_event(responder, IBV_EVENT_QP_ACCESS_ERR);
      enter_error(responder);
      return failed(IBV_WC_REM_ACCESS_ERR);
    }
    copy(qp, wr, to);
  }
  if (!writes && wr.length > 0) {  // No receive here has a buffer.
    complete_receive(responder, IBV_WC_LOC_LEN_ERR, nullptr);
    enter_error(responder);
    return failed(IBV_WC_REM_INV_REQ_ERR);
  }
  if (consumes) complete_receive(responder, IBV_WC_SUCCESS, &wr);
  return {Outcome::kDelivered};
}

std::optional<ibv_wc_status> take_fault(Qp& qp) {
  std::optional<ibv_wc_status> status = std::exchange(qp.fail_next, std::nullopt);
  return status ? status : std::exchange(device_of(qp.context).fail_next, std::nullopt);
}

Attempt attempt(Fabric& fabric, Qp& qp, const SendWr& wr) {
  if (const std::optional<ibv_wc_status> fault = take_fault(qp)) return failed(*fault);
  if (wr.length > device_of(qp.context).options.max_msg_sz) return failed(IBV_WC_LOC_LEN_ERR);
  if (!std::all_of(wr.sges.begin(), wr.sges.end(),
                   [&](const ibv_sge& sge) { return is_readable(qp, sge); })) {
    return failed(IBV_WC_LOC_PROT_ERR);
  }
  Qp* responder = find_responder(fabric, qp);
  if (responder == nullptr) return {Outcome::kLost};
  const Attempt result = respond(qp, wr, *responder);
  // A NAK, RNR or not, is lost like any acknowledgement.
  const bool nak = result.outcome != Outcome::kDelivered;
  return nak && !acks_arrive(fabric, qp) ? Attempt{Outcome::kLost} : result;
}

/// The first `acknowledged` WRs succeeded, the next has `status`, the rest is flushed.
void fail(Qp& qp, std::size_t acknowledged, ibv_wc_status status) {
  for (std::size_t i = 0; i <= acknowledged; ++i) {
    complete_send(qp, qp.sends.front(), i < acknowledged ? IBV_WC_SUCCESS : status);
    qp.sends.pop_front();
  }
  enter_error(qp);
}

bool has_expired(Fabric& fabric, std::optional<Clock::time_point>& since,
                 std::chrono::duration<double> timeout) {
  const auto now = Clock::now();
  if (!since) since = now;
  const auto end =
      *since + std::chrono::duration_cast<Clock::duration>(timeout * fabric.options.retry_scale);
  if (now >= end) return true;
  fabric.wake_at(end);
  return false;
}

/// The Local ACK Timeout (specification 9.7.6.1.3) is 4.096 us * 2^timeout; 0 is for ever.
bool has_lost_peer(Fabric& fabric, Qp& qp) {
  if (qp.attr.timeout == 0) return false;
  const std::chrono::duration<double, std::micro> once(4.096 * double(1ULL << qp.attr.timeout));
  return has_expired(fabric, qp.lost_since, once * (qp.attr.retry_cnt + 1));
}

/// The responder's min_rnr_timer as time (the kernel's enum ib_rnr_timeout), once for every
/// retry; the retry count 7 is for ever.
bool has_exhausted_rnr(Fabric& fabric, Qp& qp, const Qp& responder) {
  constexpr std::array kMilliseconds = {
      655.36, 0.01,  0.02,  0.03,  0.04,  0.06,   0.08,   0.12,   0.16,   0.24,  0.32,
      0.48,   0.64,  0.96,  1.28,  1.92,  2.56,   3.84,   5.12,   7.68,   10.24, 15.36,
      20.48,  30.72, 40.96, 61.44, 81.92, 122.88, 163.84, 245.76, 327.68, 491.52};
  if (qp.attr.rnr_retry == 7) return false;
  const std::chrono::duration<double, std::milli> once(kMilliseconds[responder.attr.min_rnr_timer]);
  return has_expired(fabric, qp.rnr_since, once * qp.attr.rnr_retry);
}

bool deliver_next(Fabric& fabric, Qp& qp) {
  if (qp.delivered == qp.sends.size()) return false;
  const SendWr& wr = qp.sends[qp.delivered];
  if (wr.deliver_at > Clock::now()) {
    fabric.wake_at(wr.deliver_at);
    return false;
  }
  const Attempt result = attempt(fabric, qp, wr);
  switch (result.outcome) {
    case Outcome::kDelivered:
      if (qp.delivered == 0) qp.lost_since.reset();
      qp.rnr_since.reset();
      ++qp.delivered;
      return true;
    case Outcome::kLost:
      // The timer is the oldest unacknowledged WR's, see acknowledge_next().
      if (qp.delivered == 0 && has_lost_peer(fabric, qp)) fail(qp, 0, IBV_WC_RETRY_EXC_ERR);
      return false;
    case Outcome::kReceiverNotReady:
      fabric.receivers_awaited = true;
      if (has_exhausted_rnr(fabric, qp, *find_responder(fabric, qp))) {
        fail(qp, qp.delivered, IBV_WC_RNR_RETRY_EXC_ERR);
      }
      return false;
    case Outcome::kFailed:
      fail(qp, qp.delivered, result.status);
      return false;
  }
  return false;
}

bool acknowledge_next(Fabric& fabric, Qp& qp) {
  if (qp.delivered == 0) return false;
  if (!acks_arrive(fabric, qp)) {
    if (has_lost_peer(fabric, qp)) fail(qp, 0, IBV_WC_RETRY_EXC_ERR);
    return false;
  }
  qp.lost_since.reset();
  const SendWr& wr = qp.sends.front();
  if (wr.ack_at > Clock::now()) {
    fabric.wake_at(wr.ack_at);
    return false;
  }
  complete_send(qp, wr, IBV_WC_SUCCESS);
  qp.sends.pop_front();
  --qp.delivered;
  return true;
}

void flush(Qp& qp) {
  for (const SendWr& wr : qp.sends) complete_send(qp, wr, IBV_WC_WR_FLUSH_ERR);
  qp.sends.clear();
  qp.delivered = 0;
  while (qp.srq == nullptr && !qp.receives.wr_ids.empty()) {
    complete_receive(qp, IBV_WC_WR_FLUSH_ERR, nullptr);
  }
}

}  // namespace

void advance(Fabric& fabric, Qp& qp) {
  if (device_of(qp.context).stalled) return;
  for (bool moved = true; moved && qp.live_state == IBV_QPS_RTS;) {
    moved = deliver_next(fabric, qp);
    moved = (qp.live_state == IBV_QPS_RTS && acknowledge_next(fabric, qp)) || moved;
  }
  if (qp.live_state == IBV_QPS_ERR) flush(qp);
}

void settle_all(Fabric& fabric) {
  do {
    fabric.rescan = false;
    for (Device& device : fabric.devices) {
      for (const auto& [number, qp] : device.qps) advance(fabric, *qp);
    }
  } while (fabric.rescan);
}

void settle(Fabric& fabric) {
  if (fabric.options.delivery == FakeDelivery::kDeferred) {
    fabric.wake_at(Clock::now());
  } else {
    settle_all(fabric);
  }
}

void enter_error(Qp& qp) {
  if (qp.live_state == IBV_QPS_ERR) return;
  qp.live_state = IBV_QPS_ERR;
  fabric_of(qp.context).rescan = true;
  // To a QP with an SRQ this tells that it takes no more from there: ibv_get_async_event(3).
  if (qp.srq != nullptr) raise_event(qp, IBV_EVENT_QP_LAST_WQE_REACHED);
}

}  // namespace rkv::verbs::fake
