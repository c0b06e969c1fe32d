// SPDX-License-Identifier: Apache-2.0
#include "verbs/queue_pair.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/endpoint_descriptor.h"
#include "core/error.h"
#include "verbs/chain_builder.h"

namespace rkv::verbs {
namespace {

/// Covers what vendors report for a cache line or two more; the WQE has this room anyway, because
/// kMaxSge SGEs take as much.
constexpr std::uint32_t kInlineBytes = 220;
static_assert(kInlineBytes <= kMaxSge * sizeof(ibv_sge), "inline bytes share the SGEs' room");

constexpr std::uint8_t kMinAckTimeout = 8;   ///< 1 ms; below it a busy receiver looks dead.
constexpr std::uint8_t kMaxAckTimeout = 31;  ///< Five bits (ibv_modify_qp(3)).

}  // namespace

std::uint8_t ack_timeout_exponent(Clock::duration peer_timeout) {
  using Nanoseconds = std::chrono::duration<double, std::nano>;
  const double budget = Nanoseconds(peer_timeout).count() / (kRetryCount + 1);
  std::uint8_t exponent = kMinAckTimeout;
  const auto timeout_ns = [](int e) { return 4096.0 * static_cast<double>(std::uint64_t{1} << e); };
  while (exponent < kMaxAckTimeout && timeout_ns(exponent + 1) <= budget) ++exponent;
  return exponent;
}

QueuePair::QueuePair(Rail& rail, std::uint32_t send_wrs)
    : rail_(&rail), psn_(static_cast<std::uint32_t>(random_u64()) & kPsnMask) {
  create(send_wrs);
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.pkey_index = 0;
  attributes.port_num = rail.port();
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
  modify(attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
         "RESET to INIT", "see the kernel log");
}

void QueuePair::create(std::uint32_t send_wrs) {
  ibv_qp_init_attr attributes{};
  attributes.qp_type = IBV_QPT_RC;
  attributes.send_cq = rail_->send_cq();
  attributes.recv_cq = rail_->receive_cq();
  attributes.srq = rail_->srq();
  attributes.cap.max_send_wr = send_wrs;
  attributes.cap.max_send_sge =
      std::min(kMaxSge, static_cast<std::uint32_t>(rail_->limits().max_sge));
  attributes.cap.max_inline_data = kInlineBytes;
  const Ibverbs& lib = rail_->lib();
  ibv_qp* qp = lib.create_qp(rail_->pd(), &attributes);
  if (qp == nullptr && errno == EINVAL) {
    // A device without inline sends, or with less room for SGEs at this depth.
    attributes.cap.max_send_wr = send_wrs;
    attributes.cap.max_send_sge = 1;
    attributes.cap.max_inline_data = 0;
    qp = lib.create_qp(rail_->pd(), &attributes);
  }
  if (qp == nullptr) {
    throw_errno("ibv_create_qp(" + rail_->name() + ")", errno,
                errno == ENOMEM ? "raise `ulimit -l` (memlock), or lower qps_per_peer"
                                : "lower queue_depth");
  }
  qp_ = {qp, Release{&lib}};
  max_sge_ = std::min(kMaxSge, attributes.cap.max_send_sge);
  max_inline_ = attributes.cap.max_inline_data;
}

void QueuePair::modify(ibv_qp_attr& attributes, int mask, const char* transition,
                       const char* remedy) {
  if (const int error = rail_->lib().modify_qp(qp_.get(), &attributes, mask)) {
    throw_errno("ibv_modify_qp(" + rail_->name() + ", " + transition + ")", error, remedy);
  }
}

void QueuePair::connect(const QpAddress& remote, const Path& path) {
  ibv_qp_attr receive{};
  receive.qp_state = IBV_QPS_RTR;
  receive.path_mtu = path.mtu;
  receive.dest_qp_num = remote.number;
  receive.rq_psn = remote.psn;
  receive.max_dest_rd_atomic = kReadsInFlight;
  receive.min_rnr_timer = kMinRnrTimer;
  receive.ah_attr.port_num = rail_->port();
  receive.ah_attr.dlid = path.lid;
  receive.ah_attr.sl = path.service_level;
  if (path.global) {
    receive.ah_attr.is_global = 1;
    std::memcpy(receive.ah_attr.grh.dgid.raw, path.gid.data(), path.gid.size());
    receive.ah_attr.grh.sgid_index = path.own_gid_index;
    receive.ah_attr.grh.hop_limit = kHopLimit;
    receive.ah_attr.grh.traffic_class = path.traffic_class;
  }
  modify(receive,
         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
         "INIT to RTR", "the peer's address is not reachable from this port; compare the GIDs");
  ibv_qp_attr send{};
  send.qp_state = IBV_QPS_RTS;
  send.timeout = path.ack_timeout;
  send.retry_cnt = kRetryCount;
  send.rnr_retry = kRnrRetryForever;
  send.sq_psn = psn_;
  send.max_rd_atomic = kReadsInFlight;
  modify(send,
         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
             IBV_QP_MAX_QP_RD_ATOMIC,
         "RTR to RTS", "see the kernel log");
}

void QueuePair::stop() {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_ERR;
  // A refusal means that the device is gone, and packets with it.
  (void)rail_->lib().modify_qp(qp_.get(), &attributes, IBV_QP_STATE);
}

void QueuePair::post(ibv_send_wr* chain) {
  ibv_send_wr* bad = nullptr;
  if (const int error = ibv_post_send(qp_.get(), chain, &bad)) {
    throw_errno("ibv_post_send(" + rail_->name() + ", QP " + std::to_string(qp_->qp_num) + ")",
                error, "the send queue's account is wrong, or the QP failed");
  }
}

}  // namespace rkv::verbs
