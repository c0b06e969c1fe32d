// SPDX-License-Identifier: Apache-2.0
/// Two hosts on a fake fabric with a connected QP on each.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>

#include <functional>
#include <thread>

#include "fake_rdma.h"

namespace rkv::verbs {

constexpr int kToInit = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
constexpr int kToRtr = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                       IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
constexpr int kToRts = IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                       IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC;
constexpr auto kPatience = std::chrono::seconds(20);

inline bool eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
}

/// One device opened, with a CQ on a channel, an SRQ and a registered buffer.
struct FakeHost {
  FakeHost(FakeFabric& fabric, int index, int cqe = 64)
      : device_name("rxe" + std::to_string(index)), gid(fabric.gid(device_name, 1)) {
    ibv_device** list = lib.get_device_list(nullptr);
    context.reset(lib.open_device(list[index]));
    lib.free_device_list(list);
    pd.reset(lib.alloc_pd(context.get()));
    channel.reset(lib.create_comp_channel(context.get()));
    cq.reset(lib.create_cq(context.get(), cqe, this, channel.get(), 0));
    ibv_srq_init_attr srq_attr{.srq_context = nullptr, .attr = {16, 1, 0}};
    srq.reset(lib.create_srq(pd.get(), &srq_attr));
    mr.reset(lib.reg_mr(pd.get(), memory.data(), memory.size(),
                        IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));
    fcntl(channel->fd, F_SETFL, O_NONBLOCK);
    fcntl(context->async_fd, F_SETFL, O_NONBLOCK);
  }

  Handle<ibv_qp> make_qp(std::uint32_t depth = 8) {
    ibv_qp_init_attr init{};
    init.send_cq = init.recv_cq = cq.get();
    init.srq = srq.get();
    init.cap = {depth, 0, 4, 0, 64};
    init.qp_type = IBV_QPT_RC;
    return {lib.create_qp(pd.get(), &init), {&lib}};
  }
  void post_receive(std::uint64_t wr_id = 7) {
    ibv_recv_wr wr{wr_id, nullptr, nullptr, 0};
    ibv_recv_wr* bad = nullptr;
    ASSERT_EQ(ibv_post_srq_recv(srq.get(), &wr, &bad), 0);
  }
  std::vector<ibv_wc> poll() {
    std::vector<ibv_wc> wcs(64);
    const int count = ibv_poll_cq(cq.get(), 64, wcs.data());
    wcs.resize(static_cast<std::size_t>(count));
    return wcs;
  }
  std::vector<ibv_wc> wait_for(std::size_t count) {
    std::vector<ibv_wc> all;
    EXPECT_TRUE(eventually([&] {
      for (const ibv_wc& wc : poll()) all.push_back(wc);
      return all.size() >= count;
    }));
    return all;
  }
  std::vector<ibv_event_type> async_events() {
    std::vector<ibv_event_type> types;
    ibv_async_event event;
    while (lib.get_async_event(context.get(), &event) == 0) {
      types.push_back(event.event_type);
      lib.ack_async_event(&event);
    }
    return types;
  }
  [[nodiscard]] std::uint64_t address() const {
    return reinterpret_cast<std::uint64_t>(memory.data());
  }

  const Ibverbs& lib = FakeFabric::table();
  std::string device_name;
  ibv_gid gid;
  std::vector<unsigned char> memory = std::vector<unsigned char>(4096);
  Handle<ibv_context> context{nullptr, {&lib}};
  Handle<ibv_pd> pd{nullptr, {&lib}};
  Handle<ibv_comp_channel> channel{nullptr, {&lib}};
  Handle<ibv_cq> cq{nullptr, {&lib}};
  Handle<ibv_srq> srq{nullptr, {&lib}};
  Handle<ibv_mr> mr{nullptr, {&lib}};
};

inline ibv_qp_attr attributes(const FakeHost& to, std::uint32_t dest_qp_num) {
  ibv_qp_attr attr{};
  attr.port_num = 1;
  attr.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
  attr.path_mtu = IBV_MTU_1024;
  attr.dest_qp_num = dest_qp_num;
  attr.rq_psn = attr.sq_psn = 5;
  attr.min_rnr_timer = 1;
  attr.timeout = 10;
  attr.retry_cnt = 1;
  attr.rnr_retry = 7;
  attr.ah_attr.is_global = 1;
  attr.ah_attr.port_num = 1;
  attr.ah_attr.grh.dgid = to.gid;
  attr.ah_attr.grh.sgid_index = 1;
  return attr;
}

inline int move(ibv_qp* qp, ibv_qp_attr attr, ibv_qp_state state, int mask) {
  attr.qp_state = state;
  return FakeFabric::table().modify_qp(qp, &attr, mask);
}

inline void connect(ibv_qp* qp, const ibv_qp_attr& attr) {
  ASSERT_EQ(move(qp, attr, IBV_QPS_INIT, kToInit), 0);
  ASSERT_EQ(move(qp, attr, IBV_QPS_RTR, kToRtr), 0);
  ASSERT_EQ(move(qp, attr, IBV_QPS_RTS, kToRts), 0);
}

/// Two hosts and a connected QP on each.
struct Pair {
  explicit Pair(FakeOptions options = {})
      : fabric([&] {
          options.devices = {{.name = "rxe0"}, {.name = "rxe1"}};
          return options;
        }()) {
    connect(qp_a.get(), attributes(b, qp_b->qp_num));
    connect(qp_b.get(), attributes(a, qp_a->qp_num));
  }
  /// Posts one write of `length` bytes from the start of a's buffer to that of b's.
  int post(std::uint64_t wr_id, unsigned int flags = IBV_SEND_SIGNALED, std::uint32_t length = 16,
           ibv_wr_opcode opcode = IBV_WR_RDMA_WRITE, ibv_qp* qp = nullptr) {
    ibv_sge sge{a.address(), length, lkey};
    ibv_send_wr wr{};
    wr.wr_id = wr_id;
    wr.sg_list = &sge;
    wr.num_sge = length == 0 ? 0 : 1;
    wr.opcode = opcode;
    wr.send_flags = flags;
    wr.imm_data = 0x01020304;
    wr.wr.rdma.remote_addr = remote_addr;
    wr.wr.rdma.rkey = rkey;
    ibv_send_wr* bad = nullptr;
    return ibv_post_send(qp == nullptr ? qp_a.get() : qp, &wr, &bad);
  }

  FakeFabric fabric;
  FakeHost a{fabric, 0};
  FakeHost b{fabric, 1};
  Handle<ibv_qp> qp_a = a.make_qp();
  Handle<ibv_qp> qp_b = b.make_qp();
  std::uint32_t lkey = a.mr->lkey;
  std::uint32_t rkey = b.mr->rkey;
  std::uint64_t remote_addr = b.address();
};

inline std::vector<ibv_wc_status> statuses(const std::vector<ibv_wc>& wcs) {
  std::vector<ibv_wc_status> result;
  for (const ibv_wc& wc : wcs) result.push_back(wc.status);
  return result;
}
using Statuses = std::vector<ibv_wc_status>;
constexpr unsigned int kSignaled = IBV_SEND_SIGNALED;
using Events = std::vector<ibv_event_type>;

}  // namespace rkv::verbs
