// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/config.h"
#include "verbs/rail.h"

namespace rkv::verbs {

/// Retries of an unacknowledged packet. 7 means "for ever" to Soft-RoCE (rxe_comp.c).
constexpr std::uint8_t kRetryCount = 6;
/// For ever (InfiniBand Architecture Specification, 9.7.5.2.8): a receiver that is slow to post
/// receives is alive; one that is gone is noticed by the probe's deadline.
constexpr std::uint8_t kRnrRetryForever = 7;
constexpr std::uint8_t kMinRnrTimer = 12;   ///< Code for 0.64 ms (Table 45).
constexpr std::uint8_t kReadsInFlight = 1;  ///< None are made; some devices refuse 0.
constexpr std::uint8_t kHopLimit = 64;      ///< Routers a RoCE v2 packet may pass.
constexpr std::uint32_t kPsnMask = 0xffffff;

/// Exponent e of the ACK timeout 4.096 us * 2^e: the largest with which all retries end within
/// `peer_timeout`. Devices may take up to four times as long (9.7.6.1.3).
[[nodiscard]] std::uint8_t ack_timeout_exponent(Clock::duration peer_timeout);

/// How packets reach the other port.
struct Path {
  bool global = false;                    ///< With a GRH: always on Ethernet.
  std::array<std::uint8_t, 16> gid = {};  ///< Of the other port, if global.
  std::uint8_t own_gid_index = 0;         ///< If global.
  std::uint16_t lid = 0;                  ///< Of the other port; 0 on Ethernet.
  ibv_mtu mtu = IBV_MTU_1024;             ///< The smaller one of both ports.
  std::uint8_t traffic_class = 0;
  std::uint8_t service_level = 0;
  std::uint8_t ack_timeout = 0;  ///< Exponent.
};

/// What a peer must know of a QP to connect to it.
struct QpAddress {
  std::uint32_t number = 0;
  std::uint32_t psn = 0;  ///< Of the first packet that it will send.
};

/// One RC queue pair: INIT after construction, RTS after connect(), destroyed by the destructor.
/// Every failure throws std::runtime_error with call, rail, errno and remedy.
class QueuePair {
 public:
  /// `send_wrs` is what its send queue must hold.
  QueuePair(Rail& rail, std::uint32_t send_wrs);

  [[nodiscard]] Rail& rail() const { return *rail_; }
  [[nodiscard]] QpAddress address() const { return {qp_->qp_num, psn_}; }
  [[nodiscard]] std::uint32_t max_sge() const { return max_sge_; }
  [[nodiscard]] std::uint32_t max_inline_bytes() const { return max_inline_; }

  void connect(const QpAddress& remote, const Path& path);

  /// To the error state: from now on it drops every packet that arrives, and what was posted is
  /// flushed. Quick, unlike the destructor.
  void stop();

  /// Posts a chain with one doorbell.
  void post(ibv_send_wr* chain);

 private:
  void create(std::uint32_t send_wrs);
  void modify(ibv_qp_attr& attributes, int mask, const char* transition, const char* remedy);

  Rail* rail_;
  Handle<ibv_qp> qp_;
  std::uint32_t psn_;
  std::uint32_t max_sge_ = 1;
  std::uint32_t max_inline_ = 0;
};

}  // namespace rkv::verbs
