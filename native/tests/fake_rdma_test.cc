// SPDX-License-Identifier: Apache-2.0
/// The fake fabric against the rules that the engine's verbs code relies on.
#include <poll.h>

#include <atomic>
#include <numeric>

#include "fake_pair.h"

namespace rkv::verbs {
namespace {

TEST(FakeRdma, StatesNeedTheirAttributes) {
  FakeFabric fabric({.devices = {{.name = "rxe0"}}});
  FakeHost host(fabric, 0);
  auto qp = host.make_qp();
  const ibv_qp_attr attr = attributes(host, qp->qp_num);
  EXPECT_EQ(move(qp.get(), attr, IBV_QPS_RTR, kToRtr), EINVAL);  // Not from RESET.
  EXPECT_EQ(move(qp.get(), attr, IBV_QPS_INIT, kToInit & ~IBV_QP_PORT), EINVAL);
  ASSERT_EQ(move(qp.get(), attr, IBV_QPS_INIT, kToInit), 0);
  for (int bit = 1; bit <= IBV_QP_DEST_QPN; bit <<= 1) {
    if ((kToRtr & bit) == 0 || bit == IBV_QP_STATE) continue;
    EXPECT_EQ(move(qp.get(), attr, IBV_QPS_RTR, kToRtr & ~bit), EINVAL) << bit;
  }
  EXPECT_EQ(move(qp.get(), attr, IBV_QPS_RTR, kToRtr | IBV_QP_TIMEOUT), EINVAL);
  ibv_qp_attr without_grh = attr;
  without_grh.ah_attr.is_global = 0;
  EXPECT_EQ(move(qp.get(), without_grh, IBV_QPS_RTR, kToRtr), EINVAL);  // RoCE
  ASSERT_EQ(move(qp.get(), attr, IBV_QPS_RTR, kToRtr), 0);
  for (int bit = 1; bit <= IBV_QP_DEST_QPN; bit <<= 1) {
    if ((kToRts & bit) == 0 || bit == IBV_QP_STATE) continue;
    EXPECT_EQ(move(qp.get(), attr, IBV_QPS_RTS, kToRts & ~bit), EINVAL) << bit;
  }
  ibv_send_wr wr{};
  ibv_send_wr* bad = nullptr;
  EXPECT_EQ(ibv_post_send(qp.get(), &wr, &bad), EINVAL);  // Not in RTR.
  EXPECT_EQ(bad, &wr);
  ASSERT_EQ(move(qp.get(), attr, IBV_QPS_RTS, kToRts), 0);
  EXPECT_EQ(qp->state, IBV_QPS_RTS);
}

TEST(FakeRdma, WritesAndSignals) {
  Pair pair;
  std::iota(pair.a.memory.begin(), pair.a.memory.end(), static_cast<unsigned char>(0));
  pair.b.post_receive(42);
  ASSERT_EQ(pair.post(1, 0, 100), 0);  // Unsignaled: no CQE.
  ASSERT_EQ(pair.post(2, IBV_SEND_SIGNALED | IBV_SEND_SOLICITED, 0, IBV_WR_SEND_WITH_IMM), 0);
  EXPECT_TRUE(
      std::equal(pair.b.memory.begin(), pair.b.memory.begin() + 100, pair.a.memory.begin()));
  const auto sent = pair.a.poll();
  ASSERT_EQ(statuses(sent), Statuses{IBV_WC_SUCCESS});
  EXPECT_EQ(sent[0].wr_id, 2U);
  const auto received = pair.b.poll();
  ASSERT_EQ(statuses(received), Statuses{IBV_WC_SUCCESS});
  EXPECT_EQ(received[0].wr_id, 42U);
  EXPECT_EQ(received[0].opcode, IBV_WC_RECV);
  EXPECT_EQ(received[0].imm_data, 0x01020304U);
  const FakeCounters counters = pair.fabric.counters("rxe0");
  EXPECT_EQ(counters.wrs, 2U);
  EXPECT_EQ(counters.doorbells, 2U);
  EXPECT_EQ(counters.bytes, 100U);
}

TEST(FakeRdma, SlotsAreFreeWhenALaterCqeIsPolled) {
  Pair pair;
  for (std::uint64_t i = 0; i < 8; ++i) ASSERT_EQ(pair.post(i, i == 5 ? kSignaled : 0), 0);
  EXPECT_EQ(pair.post(8), ENOMEM);
  ASSERT_EQ(pair.a.poll().size(), 1U);
  for (std::uint64_t i = 0; i < 6; ++i) ASSERT_EQ(pair.post(i, 0), 0);
  EXPECT_EQ(pair.post(6), ENOMEM);
  EXPECT_EQ(pair.fabric.counters().max_sq_occupancy, 8U);
}

TEST(FakeRdma, RemoteAccessErrorBreaksBothEnds) {
  for (const auto& spoil : std::vector<std::function<void(Pair&)>>{
           [](Pair& pair) { pair.rkey = pair.b.mr->lkey; },
           [](Pair& pair) { pair.remote_addr += pair.b.memory.size() - 15; },
           [](Pair& pair) { pair.b.mr.reset(); }}) {
    Pair pair;
    ASSERT_EQ(pair.post(1, 0), 0);
    spoil(pair);
    ASSERT_EQ(pair.post(2, 0), 0);
    ASSERT_EQ(pair.post(3, 0), 0);
    EXPECT_EQ(statuses(pair.a.poll()), (Statuses{IBV_WC_REM_ACCESS_ERR, IBV_WC_WR_FLUSH_ERR}));
    EXPECT_EQ(pair.b.async_events(),
              (Events{IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_QP_LAST_WQE_REACHED}));
    EXPECT_EQ(pair.post(4, 0, 16, IBV_WR_RDMA_WRITE, pair.qp_b.get()), 0);
    EXPECT_EQ(statuses(pair.b.poll()), Statuses{IBV_WC_WR_FLUSH_ERR});
    EXPECT_EQ(pair.qp_b->state, IBV_QPS_RTS);  // Only ibv_modify_qp() changes what libibverbs says.
  }
}

TEST(FakeRdma, LocalProtectionError) {
  Pair pair;
  pair.lkey = 0;
  ASSERT_EQ(pair.post(1, IBV_SEND_INLINE), 0);  // The L_Key is not looked at.
  ASSERT_EQ(pair.post(2, 0, 0), 0);
  ASSERT_EQ(pair.post(3, 0), 0);
  EXPECT_EQ(statuses(pair.a.poll()), Statuses{IBV_WC_LOC_PROT_ERR});
  EXPECT_TRUE(pair.b.async_events().empty());
}

TEST(FakeRdma, SignalsWaitForReceives) {
  Pair pair;
  ASSERT_EQ(pair.post(1, IBV_SEND_SIGNALED, 16, IBV_WR_RDMA_WRITE_WITH_IMM), 0);
  ASSERT_EQ(pair.post(2), 0);
  EXPECT_TRUE(pair.a.poll().empty());
  pair.b.post_receive();
  EXPECT_EQ(pair.a.poll().size(), 2U);
  const auto received = pair.b.poll();
  ASSERT_EQ(received.size(), 1U);
  EXPECT_EQ(received[0].opcode, IBV_WC_RECV_RDMA_WITH_IMM);
  EXPECT_EQ(received[0].byte_len, 16U);
}

TEST(FakeRdma, FiniteRnrRetriesEnd) {
  Pair pair;
  ibv_qp_attr attr = attributes(pair.b, pair.qp_b->qp_num);
  attr.rnr_retry = 2;
  ASSERT_EQ(move(pair.qp_a.get(), attr, IBV_QPS_RESET, IBV_QP_STATE), 0);
  connect(pair.qp_a.get(), attr);
  ASSERT_EQ(pair.post(1, 0, 0, IBV_WR_SEND_WITH_IMM), 0);
  EXPECT_EQ(statuses(pair.a.wait_for(1)), Statuses{IBV_WC_RNR_RETRY_EXC_ERR});
}

TEST(FakeRdma, WrongAddressReachesNobody) {
  for (const auto& spoil : std::vector<std::function<void(ibv_qp_attr&)>>{
           [](ibv_qp_attr& attr) { attr.ah_attr.grh.dgid.raw[15] = 99; },
           [](ibv_qp_attr& attr) { attr.dest_qp_num += 1; },
           [](ibv_qp_attr& attr) { attr.sq_psn += 1; }}) {
    Pair pair;
    ibv_qp_attr attr = attributes(pair.b, pair.qp_b->qp_num);
    spoil(attr);
    ASSERT_EQ(move(pair.qp_a.get(), attr, IBV_QPS_RESET, IBV_QP_STATE), 0);
    connect(pair.qp_a.get(), attr);
    ASSERT_EQ(pair.post(1), 0);
    EXPECT_EQ(statuses(pair.a.wait_for(1)), Statuses{IBV_WC_RETRY_EXC_ERR});
  }
}

TEST(FakeRdma, SilentPeerExhaustsRetries) {
  for (const auto& silence : std::vector<std::function<void(Pair&)>>{
           [](Pair& pair) { pair.fabric.drop_all_from("rxe1"); },
           [](Pair& pair) { pair.fabric.stall("rxe1"); },
           [](Pair& pair) { pair.fabric.port_down("rxe1"); },
           [](Pair& pair) { pair.qp_b.reset(); }}) {
    Pair pair;
    silence(pair);
    const auto start = std::chrono::steady_clock::now();
    ASSERT_EQ(pair.post(1, 0), 0);
    ASSERT_EQ(pair.post(2, 0), 0);
    EXPECT_EQ(statuses(pair.a.wait_for(2)), (Statuses{IBV_WC_RETRY_EXC_ERR, IBV_WC_WR_FLUSH_ERR}));
    // 4.096 us * 2^10 * 2
    EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::microseconds(8388));
  }
}

TEST(FakeRdma, StalledDeviceCompletesNothingUntilItGoesOn) {
  Pair pair;
  pair.fabric.stall("rxe0");
  ASSERT_EQ(pair.post(1), 0);
  ASSERT_EQ(move(pair.qp_a.get(), {}, IBV_QPS_ERR, IBV_QP_STATE), 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  EXPECT_TRUE(pair.a.poll().empty());
  pair.fabric.stall("rxe0", false);
  EXPECT_EQ(statuses(pair.a.poll()), Statuses{IBV_WC_WR_FLUSH_ERR});
}

TEST(FakeRdma, InjectedFailure) {
  Pair pair;
  pair.fabric.fail_next(pair.qp_a.get(), IBV_WC_GENERAL_ERR);
  ASSERT_EQ(pair.post(1, 0), 0);
  ASSERT_EQ(pair.post(2, 0), 0);
  EXPECT_EQ(statuses(pair.a.poll()), (Statuses{IBV_WC_GENERAL_ERR, IBV_WC_WR_FLUSH_ERR}));
  pair.fabric.fail_next_reg_mr("rxe0", ENOMEM);
  EXPECT_EQ(pair.a.lib.reg_mr(pair.a.pd.get(), pair.a.memory.data(), 1, 0), nullptr);
  EXPECT_EQ(errno, ENOMEM);
}

TEST(FakeRdma, PortEvents) {
  Pair pair;
  pair.fabric.port_down("rxe0");
  ibv_port_attr attr{};
  ASSERT_EQ(pair.a.lib.query_port(pair.a.context.get(), 1, &attr), 0);
  EXPECT_EQ(attr.state, IBV_PORT_DOWN);
  pair.fabric.port_up("rxe0");
  EXPECT_EQ(pair.a.async_events(), (Events{IBV_EVENT_PORT_ERR, IBV_EVENT_PORT_ACTIVE}));
}

TEST(FakeRdma, NotificationIsOneShot) {
  Pair pair;
  ibv_cq* cq = nullptr;
  void* owner = nullptr;
  const auto has_event = [&] {
    return pair.a.lib.get_cq_event(pair.a.channel.get(), &cq, &owner) == 0;
  };
  ASSERT_EQ(pair.post(1), 0);
  ASSERT_EQ(ibv_req_notify_cq(pair.a.cq.get(), 0), 0);
  EXPECT_FALSE(has_event());  // Not for a CQE that was there before.
  EXPECT_EQ(errno, EAGAIN);
  ASSERT_EQ(pair.post(2), 0);
  ASSERT_EQ(pair.post(3), 0);
  pollfd readable{pair.a.channel->fd, POLLIN, 0};
  EXPECT_EQ(::poll(&readable, 1, 0), 1);
  ASSERT_TRUE(has_event());
  EXPECT_EQ(owner, &pair.a);
  EXPECT_FALSE(has_event());
  pair.a.lib.ack_cq_events(cq, 1);
}

TEST(FakeRdma, OverflowIsReported) {
  FakeFabric fabric;
  FakeHost host(fabric, 0, 2);
  auto qp = host.make_qp();
  connect(qp.get(), attributes(host, qp->qp_num));
  ASSERT_EQ(move(qp.get(), {}, IBV_QPS_ERR, IBV_QP_STATE), 0);
  for (int i = 0; i < 3; ++i) {
    ibv_send_wr wr{};
    ibv_send_wr* bad = nullptr;
    ASSERT_EQ(ibv_post_send(qp.get(), &wr, &bad), 0);
  }
  EXPECT_TRUE(fabric.overflowed());
  EXPECT_EQ(host.async_events(), (Events{IBV_EVENT_QP_LAST_WQE_REACHED, IBV_EVENT_CQ_ERR}));
}

TEST(FakeRdma, WhatIsInUseIsBusy) {
  FakeFabric fabric;
  {
    FakeHost host(fabric, 0);
    auto qp = host.make_qp();
    EXPECT_EQ(host.lib.destroy_cq(host.cq.get()), EBUSY);
    EXPECT_EQ(host.lib.destroy_srq(host.srq.get()), EBUSY);
    EXPECT_EQ(host.lib.dealloc_pd(host.pd.get()), EBUSY);
    EXPECT_EQ(host.lib.destroy_comp_channel(host.channel.get()), EBUSY);
    EXPECT_EQ(host.lib.close_device(host.context.get()), EBUSY);
    EXPECT_EQ(fabric.live_objects(), 7U);
  }
  EXPECT_EQ(fabric.live_objects(), 0U);
}

TEST(FakeRdma, CqesOutliveTheirQp) {
  Pair pair;
  ASSERT_EQ(pair.post(1), 0);
  pair.qp_a.reset();
  EXPECT_EQ(pair.a.poll().size(), 1U);
}

TEST(FakeRdma, DestroyWaitsForAcknowledgedEvents) {
  Pair pair;
  ASSERT_EQ(move(pair.qp_a.get(), {}, IBV_QPS_ERR, IBV_QP_STATE), 0);
  ibv_async_event event;
  ASSERT_EQ(pair.a.lib.get_async_event(pair.a.context.get(), &event), 0);
  std::atomic<bool> acked = false;
  std::thread acknowledger([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    acked = true;
    pair.a.lib.ack_async_event(&event);
  });
  pair.qp_a.reset();
  EXPECT_TRUE(acked);
  acknowledger.join();
}

/// Within a QP a signal tells of every earlier write; between QPs nothing is in order.
TEST(FakeRdma, DeferredDeliveryKeepsOrderWithinAQpOnly) {
  Pair pair({.delivery = FakeDelivery::kDeferred, .max_delay = std::chrono::microseconds(500)});
  auto other_a = pair.a.make_qp();
  auto other_b = pair.b.make_qp();
  connect(other_a.get(), attributes(pair.b, other_b->qp_num));
  connect(other_b.get(), attributes(pair.a, other_a->qp_num));
  bool reordered = false;
  for (unsigned char round = 1; round <= 50; ++round) {
    pair.b.post_receive();
    pair.b.post_receive();
    std::fill(pair.a.memory.begin(), pair.a.memory.end(), round);
    ASSERT_EQ(pair.post(1, IBV_SEND_SIGNALED, 2048), 0);
    ASSERT_EQ(pair.post(2, IBV_SEND_SIGNALED, 0, IBV_WR_RDMA_WRITE_WITH_IMM), 0);
    ASSERT_EQ(pair.post(3, IBV_SEND_SIGNALED, 0, IBV_WR_SEND_WITH_IMM, other_a.get()), 0);
    const auto received = pair.b.wait_for(2);
    for (const ibv_wc& wc : received) {
      if (wc.qp_num == pair.qp_b->qp_num) {
        EXPECT_EQ(pair.b.memory[2047], round);
      }
    }
    reordered |= received[0].qp_num == other_b->qp_num;
    EXPECT_EQ(pair.a.wait_for(3).size(), 3U);
  }
  EXPECT_TRUE(reordered);
}

TEST(FakeRdma, NullDeliveryOnlyCounts) {
  Pair pair({.delivery = FakeDelivery::kNull});
  pair.a.memory[0] = 1;
  for (std::uint64_t i = 0; i < 8; ++i) ASSERT_EQ(pair.post(i, i == 7 ? kSignaled : 0), 0);
  EXPECT_EQ(pair.post(8), ENOMEM);
  EXPECT_EQ(statuses(pair.a.poll()), Statuses{IBV_WC_SUCCESS});
  EXPECT_EQ(pair.post(8), 0);
  EXPECT_EQ(pair.b.memory[0], 0);
  EXPECT_EQ(pair.fabric.counters().wrs, 9U);
  EXPECT_EQ(pair.fabric.counters().signaled, 2U);
}

}  // namespace
}  // namespace rkv::verbs
