// SPDX-License-Identifier: Apache-2.0
/// Posting and polling: ibv_post_send(3), ibv_post_srq_recv(3), ibv_poll_cq(3).
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#include "fake_objects.h"

namespace rkv::verbs::fake {
namespace {

constexpr std::uint32_t kPoison = 0xdeadbeef;

bool is_write(ibv_wr_opcode opcode) {
  return opcode == IBV_WR_RDMA_WRITE || opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
}
bool has_imm(ibv_wr_opcode opcode) {
  return opcode == IBV_WR_RDMA_WRITE_WITH_IMM || opcode == IBV_WR_SEND_WITH_IMM;
}

bool append(Cq& cq, const Cqe& cqe) {
  if (cq.count == cq.ring.size()) return false;
  std::size_t tail = cq.head + cq.count;
  if (tail >= cq.ring.size()) tail -= cq.ring.size();
  cq.ring[tail] = cqe;
  ++cq.count;
  return true;
}

void overflow(Cq& cq) {
  fabric_of(cq.context).overflowed = true;
  if (!cq.in_error) raise_event(cq, IBV_EVENT_CQ_ERR);
  cq.in_error = true;
}

void push_cqe(Cq& cq, const Cqe& cqe, bool solicited) {
  if (!append(cq, cqe)) return overflow(cq);
  notify(cq, solicited || cqe.wc.status != IBV_WC_SUCCESS);
}

/// "If the completion status is other than IBV_WC_SUCCESS, only the following attributes are
/// valid: wr_id, status, qp_num, and vendor_err", ibv_poll_cq(3): the others mislead.
ibv_wc make_wc(const Qp& qp, std::uint64_t wr_id, ibv_wc_status status, bool of_send) {
  ibv_wc wc{};
  wc.wr_id = wr_id;
  wc.status = status;
  wc.qp_num = qp.qp_num;
  if (status == IBV_WC_SUCCESS) return wc;
  wc.opcode = of_send ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RDMA_WRITE;
  wc.byte_len = kPoison;
  wc.imm_data = kPoison;
  wc.wc_flags = IBV_WC_WITH_IMM;
  return wc;
}

std::uint64_t total_length(const ibv_send_wr& wr) {
  return std::accumulate(wr.sg_list, wr.sg_list + wr.num_sge, std::uint64_t{0},
                         [](std::uint64_t sum, const ibv_sge& sge) { return sum + sge.length; });
}

/// The errno of posting `wr`, 0 if it is fine.
int check_send(const Qp& qp, const ibv_send_wr& wr) {
  if (qp.live_state != IBV_QPS_RTS && qp.live_state != IBV_QPS_ERR) return EINVAL;
  if (!is_write(wr.opcode) && wr.opcode != IBV_WR_SEND && wr.opcode != IBV_WR_SEND_WITH_IMM) {
    return EINVAL;
  }
  if (wr.num_sge < 0 || static_cast<std::uint32_t>(wr.num_sge) > qp.cap.max_send_sge) {
    return EINVAL;
  }
  if ((wr.send_flags & IBV_SEND_INLINE) != 0 && total_length(wr) > qp.cap.max_inline_data) {
    return EINVAL;
  }
  return qp.sq_posted - qp.sq_freed >= qp.cap.max_send_wr ? ENOMEM : 0;
}

/// With IBV_SEND_INLINE "the L_Key will not be checked" and "the buffer can be reused immediately
/// after the call returns", ibv_post_send(3).
std::vector<std::byte> gather_inline(const ibv_send_wr& wr) {
  std::vector<std::byte> data;
  for (int i = 0; i < wr.num_sge; ++i) {
    const auto* from = reinterpret_cast<const std::byte*>(wr.sg_list[i].addr);
    data.insert(data.end(), from, from + wr.sg_list[i].length);
  }
  return data;
}

Clock::time_point delayed(Fabric& fabric) {
  std::uniform_int_distribution<std::int64_t> delay(0, fabric.options.max_delay.count());
  return Clock::now() + std::chrono::microseconds(delay(fabric.random));
}

void enqueue(Fabric& fabric, Qp& qp, const ibv_send_wr& wr) {
  SendWr& own = qp.sends.emplace_back();
  own.wr_id = wr.wr_id;
  own.opcode = wr.opcode;
  own.flags = wr.send_flags | (qp.signal_all ? unsigned{IBV_SEND_SIGNALED} : 0U);
  own.imm_data = wr.imm_data;
  own.remote_addr = wr.wr.rdma.remote_addr;
  own.rkey = wr.wr.rdma.rkey;
  own.length = total_length(wr);
  own.sq_freed = ++qp.sq_posted;
  if ((own.flags & IBV_SEND_INLINE) != 0) {
    own.inlined = gather_inline(wr);
  } else {
    own.sges.assign(wr.sg_list, wr.sg_list + wr.num_sge);
  }
  if (fabric.options.delivery != FakeDelivery::kDeferred) return;
  own.deliver_at = qp.last_delivery = std::max(qp.last_delivery, delayed(fabric));
  own.ack_at = qp.last_ack = std::max({qp.last_ack, own.deliver_at, delayed(fabric)});
  fabric.wake_at(own.deliver_at);
}

void count_send(Tallies& tallies, const SendWr& wr, int num_sge) {
  tallies.wrs.add(1);
  tallies.bytes.add(wr.length);
  if ((wr.flags & IBV_SEND_SIGNALED) != 0) tallies.signaled.add(1);
  if ((wr.flags & IBV_SEND_INLINE) != 0) tallies.inlined.add(1);
  tallies.sges[std::min(static_cast<std::size_t>(num_sge), tallies.sges.size() - 1)].add(1);
}

int post_receives(Fabric& fabric, ReceiveQueue& queue, ibv_recv_wr* wr, ibv_recv_wr** bad) {
  for (; wr != nullptr; wr = wr->next) {
    // Immediate data needs no buffer, and nothing else is received here.
    const int error = wr->num_sge != 0                        ? EINVAL
                      : queue.wr_ids.size() == queue.capacity ? ENOMEM
                                                              : 0;
    if (error != 0) {
      *bad = wr;
      return error;
    }
    queue.wr_ids.push_back(wr->wr_id);
  }
  if (fabric.receivers_awaited) {
    fabric.receivers_awaited = false;
    settle(fabric);
  }
  return 0;
}

int poll(Cq& cq, int capacity, ibv_wc* wc) {
  const int count = static_cast<int>(std::min(cq.count, static_cast<std::size_t>(capacity)));
  for (int i = 0; i < count; ++i) {
    const Cqe& cqe = cq.ring[cq.head];
    wc[i] = cqe.wc;
    if (cqe.qp != nullptr) cqe.qp->sq_freed = cqe.sq_freed;
    if (++cq.head == cq.ring.size()) cq.head = 0;
    --cq.count;
  }
  return count;
}

}  // namespace

int post_send(ibv_qp* base, ibv_send_wr* wr, ibv_send_wr** bad) {
  Fabric& fabric = fabric_of(base->context);
  const std::lock_guard lock(fabric.mutex);
  Qp& qp = qp_of(base);
  const std::uint64_t before = qp.sq_posted;
  int error = 0;
  for (; wr != nullptr; wr = wr->next) {
    error = check_send(qp, *wr);
    if (error != 0) {
      *bad = wr;
      break;
    }
    enqueue(fabric, qp, *wr);
    count_send(qp.tallies, qp.sends.back(), wr->num_sge);
  }
  if (qp.sq_posted == before) return error;
  qp.tallies.doorbells.add(1);
  qp.tallies.max_sq_occupancy.raise(qp.sq_posted - qp.sq_freed);
  if (fabric.options.delivery == FakeDelivery::kSynchronous) {
    advance(fabric, qp);
    if (fabric.rescan) settle(fabric);
  }
  return error;
}

int post_recv(ibv_qp* base, ibv_recv_wr* wr, ibv_recv_wr** bad) {
  Fabric& fabric = fabric_of(base->context);
  const std::lock_guard lock(fabric.mutex);
  Qp& qp = qp_of(base);
  if (qp.srq != nullptr || qp.live_state == IBV_QPS_RESET) {
    *bad = wr;
    return EINVAL;
  }
  const int error = post_receives(fabric, qp.receives, wr, bad);
  if (qp.live_state == IBV_QPS_ERR) settle(fabric);
  return error;
}

int post_srq_recv(ibv_srq* base, ibv_recv_wr* wr, ibv_recv_wr** bad) {
  Fabric& fabric = fabric_of(base->context);
  const std::lock_guard lock(fabric.mutex);
  return post_receives(fabric, srq_of(base).receives, wr, bad);
}

int poll_cq(ibv_cq* cq, int capacity, ibv_wc* wc) {
  const std::lock_guard lock(fabric_of(cq->context).mutex);
  return poll(cq_of(cq), capacity, wc);
}

int post_send_null(ibv_qp* base, ibv_send_wr* wr, ibv_send_wr** bad) {
  Qp& qp = qp_of(base);
  Cq& cq = cq_of(qp.send_cq);
  const unsigned int always = qp.signal_all ? unsigned{IBV_SEND_SIGNALED} : 0U;
  const std::uint64_t before = qp.sq_posted;
  const std::uint64_t limit = qp.sq_freed + qp.cap.max_send_wr;
  std::uint64_t signaled = 0;
  for (; wr != nullptr && qp.sq_posted < limit; wr = wr->next) {
    ++qp.sq_posted;
    if (((wr->send_flags | always) & IBV_SEND_SIGNALED) == 0) continue;
    ++signaled;
    Cqe cqe{make_wc(qp, wr->wr_id, IBV_WC_SUCCESS, true), &qp, qp.sq_posted};
    cqe.wc.opcode = is_write(wr->opcode) ? IBV_WC_RDMA_WRITE : IBV_WC_SEND;
    const bool kept = append(cq, cqe);
    if (kept && !cq.armed) continue;
    const std::lock_guard lock(fabric_of(base->context).mutex);
    kept ? notify(cq, false) : overflow(cq);
  }
  if (qp.sq_posted != before) {
    qp.tallies.wrs.add(qp.sq_posted - before);
    qp.tallies.doorbells.add(1);
    qp.tallies.signaled.add(signaled);
    qp.tallies.max_sq_occupancy.raise(qp.sq_posted - qp.sq_freed);
  }
  if (wr == nullptr) return 0;
  *bad = wr;
  return ENOMEM;
}

int poll_cq_null(ibv_cq* cq, int capacity, ibv_wc* wc) { return poll(cq_of(cq), capacity, wc); }

void complete_send(Qp& qp, const SendWr& wr, ibv_wc_status status) {
  if (status == IBV_WC_SUCCESS && (wr.flags & IBV_SEND_SIGNALED) == 0) return;
  Cqe cqe{make_wc(qp, wr.wr_id, status, true), &qp, wr.sq_freed};
  if (status == IBV_WC_SUCCESS) {
    cqe.wc.opcode = is_write(wr.opcode) ? IBV_WC_RDMA_WRITE : IBV_WC_SEND;
  }
  push_cqe(cq_of(qp.send_cq), cqe, false);
}

void complete_receive(Qp& qp, ibv_wc_status status, const SendWr* wr) {
  ReceiveQueue& receives = receives_of(qp);
  Cqe cqe{make_wc(qp, receives.wr_ids.front(), status, false), nullptr, 0};
  receives.wr_ids.pop_front();
  if (status == IBV_WC_SUCCESS) {
    cqe.wc.opcode = is_write(wr->opcode) ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV;
    cqe.wc.byte_len = static_cast<std::uint32_t>(wr->length);
    cqe.wc.imm_data = has_imm(wr->opcode) ? wr->imm_data : kPoison;
    cqe.wc.wc_flags = has_imm(wr->opcode) ? IBV_WC_WITH_IMM : 0;
  }
  push_cqe(cq_of(qp.recv_cq), cqe, wr != nullptr && (wr->flags & IBV_SEND_SOLICITED) != 0);
}

void forget(Cq& cq, const Qp& qp) {
  for (Cqe& cqe : cq.ring) {
    if (cqe.qp == &qp) cqe.qp = nullptr;
  }
}

void purge(Cq& cq, const Qp& qp) {
  std::vector<Cqe> kept;
  for (std::size_t i = 0; i < cq.count; ++i) {
    const Cqe& cqe = cq.ring[(cq.head + i) % cq.ring.size()];
    if (cqe.wc.qp_num != qp.qp_num) kept.push_back(cqe);
  }
  std::copy(kept.begin(), kept.end(), cq.ring.begin());
  cq.head = 0;
  cq.count = kept.size();
}

}  // namespace rkv::verbs::fake
