// SPDX-License-Identifier: Apache-2.0
/// An RDMA fabric in this process, behind the table of libibverbs functions: RC queue pairs,
/// SRQs, CQs and MRs with the rules of the InfiniBand specification and the man pages, so that
/// the engine's verbs code runs under sanitizers on hosts without RDMA devices.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "verbs/ibverbs.h"

namespace rkv::verbs {

/// One device with one port, ACTIVE at first. The defaults are near those of an mlx5 device.
struct FakeDeviceOptions {
  std::string name = "rxe0";
  int max_qp_wr = 8192;
  int max_cqe = 65536;
  int max_sge = 30;
  int max_srq_wr = 8192;
  std::uint32_t max_inline = 512;
  std::uint64_t max_mr_size = std::numeric_limits<std::uint64_t>::max();
  std::uint32_t max_msg_sz = 1U << 30;
  ibv_mtu active_mtu = IBV_MTU_4096;
  std::uint8_t link_layer = IBV_LINK_LAYER_ETHERNET;
  std::uint16_t lid = 0;  ///< InfiniBand only; 0 there means position in the list, plus 1.
  /// Empty: fe80::N and ::ffff:10.0.0.N, where N is the position in the list, plus 1.
  std::vector<ibv_gid> gids = {};
};

enum class FakeDelivery : std::uint8_t {
  kSynchronous,  ///< Inside ibv_post_send(), data and CQEs both.
  kDeferred,     ///< By a thread after random delays: in order within a QP, in none between QPs.
  kNull,         ///< Nothing is checked but the SQ's capacity, nothing moves, signaled WRs complete
                 ///< at once. No locks: a CQ and its QPs belong to one thread. For timing posts.
};

struct FakeOptions {
  std::vector<FakeDeviceOptions> devices = {FakeDeviceOptions{}};
  FakeDelivery delivery = FakeDelivery::kSynchronous;
  std::uint64_t seed = 1;                    ///< Of the delays.
  std::chrono::microseconds max_delay{200};  ///< Of a message, and again of its acknowledgement.
  double retry_scale = 1.0;                  ///< Shortens ACK and RNR timeouts for fast tests.
  bool reuse_qpns = false;                   ///< A destroyed QP's number is the next one's.
  bool refuse_relaxed_ordering = false;      ///< ibv_reg_mr_iova2() with it fails with EINVAL.
};

/// What was posted since the fabric began, destroyed QPs included. With kNull only `wrs`,
/// `doorbells`, `signaled` and `max_sq_occupancy` are counted.
struct FakeCounters {
  std::uint64_t wrs = 0;
  std::uint64_t doorbells = 0;  ///< Calls of ibv_post_send() that posted something.
  std::uint64_t signaled = 0;
  std::uint64_t inlined = 0;
  std::uint64_t bytes = 0;
  std::uint64_t max_sq_occupancy = 0;       ///< Of any one QP.
  std::array<std::uint64_t, 33> sges = {};  ///< WRs by their number of SGEs; the last: 32 or more.
};

/// ibv_get_device_list() lists the devices of the fabric constructed last that still exists;
/// everything else finds its fabric from its arguments, so several may be in use at once.
///
/// QPNs and keys are numbered per device from the same start, as on real hosts: code that takes
/// them as unique across devices fails here too. Every method is thread-safe.
class FakeFabric {
 public:
  explicit FakeFabric(FakeOptions options = {});
  FakeFabric(const FakeFabric&) = delete;
  FakeFabric& operator=(const FakeFabric&) = delete;
  /// Everything opened through the table must be released before (see live_objects()).
  ~FakeFabric();

  /// Has no reg_dmabuf_mr. Copy it to take further functions away.
  [[nodiscard]] static const Ibverbs& table();
  [[nodiscard]] ibv_gid gid(const std::string& device, std::size_t index) const;

  /// The next WR to go out on the QP, or on any QP of the device, completes with `status`,
  /// moves nothing, and takes its QP to the error state.
  void fail_next(const ibv_qp* qp, ibv_wc_status status);
  void fail_next(const std::string& device, ibv_wc_status status);
  /// The next `times` registrations fail with errno `error`.
  void fail_next_reg_mr(const std::string& device, int error, int times = 1);
  /// No packet leaves the device, acknowledgements included; what it is sent still lands. Peers
  /// see RETRY_EXC_ERR once their ACK timeout, 4.096 us * 2^timeout * (retry_cnt + 1), is over.
  void drop_all_from(const std::string& device, bool on = true);
  /// A hung device: it neither sends, receives nor completes anything, not even flushes.
  void stall(const std::string& device, bool on = true);
  /// The port's state with IBV_EVENT_PORT_ERR or PORT_ACTIVE; packets to and from it are lost.
  void port_down(const std::string& device);
  void port_up(const std::string& device);

  [[nodiscard]] FakeCounters counters() const;
  [[nodiscard]] FakeCounters counters(const std::string& device) const;
  /// Contexts, PDs, MRs, channels, CQs, SRQs, QPs and device lists not yet released.
  [[nodiscard]] std::size_t live_objects() const;
  /// Whether a CQ ever lost a CQE for want of room.
  [[nodiscard]] bool overflowed() const;

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace rkv::verbs
