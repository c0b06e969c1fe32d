// SPDX-License-Identifier: Apache-2.0
/// The inside of the fake fabric. One mutex guards everything, FakeDelivery::kNull apart.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <thread>

#include "fake_rdma.h"

namespace rkv::verbs::fake {

using Clock = std::chrono::steady_clock;
using Fabric = FakeFabric::State;
struct Qp;

/// A counter of one writer that any thread may read. No locked instruction: kNull is timed.
class Tally {
 public:
  void add(std::uint64_t amount) { set(get() + amount); }
  void raise(std::uint64_t value) {
    if (value > get()) set(value);
  }
  [[nodiscard]] std::uint64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  void set(std::uint64_t value) { value_.store(value, std::memory_order_relaxed); }
  std::atomic<std::uint64_t> value_{0};
};

struct Tallies {
  Tally wrs, doorbells, signaled, inlined, bytes, max_sq_occupancy;
  std::array<Tally, std::tuple_size_v<decltype(FakeCounters::sges)>> sges;

  [[nodiscard]] FakeCounters read() const;
};

void add(FakeCounters& sum, const FakeCounters& more);

/// Events behind a file descriptor: an eventfd that counts them. Discarded ones keep their count,
/// so a reader may be woken for nothing.
template <class Event>
class EventQueue {
 public:
  EventQueue() : fd_(eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE)) {}
  EventQueue(const EventQueue&) = delete;
  EventQueue& operator=(const EventQueue&) = delete;
  ~EventQueue() { close(fd_); }

  [[nodiscard]] int fd() const { return fd_; }
  void push(const Event& event) {
    events_.push_back(event);
    eventfd_write(fd_, 1);
  }
  template <class Predicate>
  void discard(Predicate unwanted) {
    for (std::optional<Event>& event : events_) {
      if (event && unwanted(*event)) event.reset();
    }
  }
  /// Outside the lock: blocks unless the descriptor is O_NONBLOCK. False: see errno.
  [[nodiscard]] bool wait() const {
    eventfd_t count = 0;
    return eventfd_read(fd_, &count) == 0;
  }
  /// After wait(). Empty if that event was discarded.
  std::optional<Event> pop() {
    std::optional<Event> event = events_.front();
    events_.pop_front();
    return event;
  }

 private:
  int fd_;
  std::deque<std::optional<Event>> events_;
};

struct Mr : ibv_mr {
  std::uint64_t iova = 0;
  unsigned int access = 0;

  /// Where `address` is in memory; null unless the whole range is inside.
  [[nodiscard]] std::byte* at(std::uint64_t address, std::uint64_t nbytes) const {
    if (address < iova || nbytes > length || address - iova > length - nbytes) return nullptr;
    return static_cast<std::byte*>(addr) + (address - iova);
  }
};

struct Context;

struct Device : ibv_device {
  Fabric* fabric = nullptr;
  FakeDeviceOptions options;
  std::vector<Context*> contexts;
  std::map<std::uint32_t, Qp*> qps;
  std::map<std::uint32_t, Mr*> mrs;  // By key / 256, as hardware indexes them.
  std::uint32_t next_qpn = 17;       // Lower ones are reserved, as on rxe.
  std::uint32_t next_mr = 1;
  FakeCounters destroyed;  // Of QPs that are gone.
  bool port_up = true;
  bool dropping = false;
  bool stalled = false;
  std::optional<ibv_wc_status> fail_next;
  int reg_mr_error = 0;
  int reg_mr_failures = 0;
};

struct Context : verbs_context {
  Device* device = nullptr;
  unsigned int users = 0;
  EventQueue<ibv_async_event> events;
};

struct Pd : ibv_pd {
  unsigned int users = 0;
};

struct Cq;

struct Channel : ibv_comp_channel {
  EventQueue<Cq*> events;
};

struct Cqe {
  ibv_wc wc;
  Qp* qp;                  // Of a send, to free its SQ slots; null once the QP is destroyed.
  std::uint64_t sq_freed;  // Slots up to here are free when this CQE is polled.
};

struct Cq : ibv_cq {
  std::vector<Cqe> ring;
  std::size_t head = 0;
  std::size_t count = 0;
  unsigned int users = 0;
  bool armed = false;
  bool solicited_only = false;
  bool in_error = false;
  std::uint32_t comp_events_got = 0;
  std::uint32_t async_events_got = 0;
};

struct ReceiveQueue {
  std::deque<std::uint64_t> wr_ids;
  std::size_t capacity = 0;
};

struct Srq : ibv_srq {
  ReceiveQueue receives;
  unsigned int users = 0;
};

struct SendWr {
  std::uint64_t wr_id;
  ibv_wr_opcode opcode;
  unsigned int flags;
  __be32 imm_data;
  std::uint64_t remote_addr;
  std::uint32_t rkey;
  std::uint64_t length;
  std::uint64_t sq_freed;
  std::vector<ibv_sge> sges;
  std::vector<std::byte> inlined;
  Clock::time_point deliver_at;
  Clock::time_point ack_at;
};

struct Qp : ibv_qp {
  ibv_qp_cap cap = {};
  bool signal_all = false;
  /// ibv_qp::state is what ibv_modify_qp() set last; this is what the QP is in.
  ibv_qp_state live_state = IBV_QPS_RESET;
  ibv_qp_attr attr = {};
  std::deque<SendWr> sends;  // The first `delivered` of them await their acknowledgement.
  std::size_t delivered = 0;
  std::uint64_t sq_posted = 0;
  std::uint64_t sq_freed = 0;
  ReceiveQueue receives;  // Without SRQ.
  Tallies tallies;
  std::optional<Clock::time_point> lost_since;
  std::optional<Clock::time_point> rnr_since;
  Clock::time_point last_delivery;
  Clock::time_point last_ack;
  std::optional<ibv_wc_status> fail_next;
  bool comm_established = false;
  std::uint32_t async_events_got = 0;
};

inline Context& context_of(ibv_context* base) {
  return *static_cast<Context*>(verbs_get_ctx(base));
}
inline Device& device_of(ibv_context* base) { return *context_of(base).device; }
inline Fabric& fabric_of(ibv_context* base) { return *device_of(base).fabric; }
inline Pd& pd_of(ibv_pd* base) { return *static_cast<Pd*>(base); }
inline Cq& cq_of(ibv_cq* base) { return *static_cast<Cq*>(base); }
inline Srq& srq_of(ibv_srq* base) { return *static_cast<Srq*>(base); }
inline Qp& qp_of(ibv_qp* base) { return *static_cast<Qp*>(base); }
inline ReceiveQueue& receives_of(Qp& qp) {
  return qp.srq != nullptr ? srq_of(qp.srq).receives : qp.receives;
}

// fake_rdma.cc
ibv_device** get_device_list(int* count);
void free_device_list(ibv_device** list);

// fake_objects.cc
template <class Object>
Object* fail_with(int error) {
  errno = error;
  return nullptr;
}

// fake_qp.cc
ibv_qp* create_qp(ibv_pd* pd, ibv_qp_init_attr* init);
int modify_qp(ibv_qp* qp, ibv_qp_attr* attr, int mask);
int destroy_qp(ibv_qp* qp);

// fake_events.cc
ibv_comp_channel* create_comp_channel(ibv_context* context);
int destroy_comp_channel(ibv_comp_channel* channel);
int get_cq_event(ibv_comp_channel* channel, ibv_cq** cq, void** cq_context);
void ack_cq_events(ibv_cq* cq, unsigned int count);
int req_notify_cq(ibv_cq* cq, int solicited_only);
int get_async_event(ibv_context* context, ibv_async_event* event);
void ack_async_event(ibv_async_event* event);
const char* wc_status_str(ibv_wc_status status);
const char* event_type_str(ibv_event_type type);
/// Tells the CQ's channel if the CQ is armed for such a CQE.
void notify(Cq& cq, bool solicited);
void raise_event(Qp& qp, ibv_event_type type);
void raise_event(Cq& cq, ibv_event_type type);
void raise_event(Device& device, ibv_event_type type);
/// Waits until every event got for the object is acknowledged; drops those not got yet.
void settle_events(Qp& qp, std::unique_lock<std::mutex>& lock);
void settle_events(Cq& cq, std::unique_lock<std::mutex>& lock);

// fake_datapath.cc
int post_send(ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad);
int post_recv(ibv_qp* qp, ibv_recv_wr* wr, ibv_recv_wr** bad);
int post_srq_recv(ibv_srq* srq, ibv_recv_wr* wr, ibv_recv_wr** bad);
int poll_cq(ibv_cq* cq, int capacity, ibv_wc* wc);
int post_send_null(ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad);
int poll_cq_null(ibv_cq* cq, int capacity, ibv_wc* wc);
void complete_send(Qp& qp, const SendWr& wr, ibv_wc_status status);
void complete_receive(Qp& qp, ibv_wc_status status, const SendWr* wr);
/// Forgets the QP in CQEs, or takes its CQEs away.
void forget(Cq& cq, const Qp& qp);
void purge(Cq& cq, const Qp& qp);

// fake_delivery.cc
/// Moves what the QP has to move by now.
void advance(Fabric& fabric, Qp& qp);
/// Advances every QP: inside this call, or by the thread when delivery is deferred.
void settle(Fabric& fabric);
void settle_all(Fabric& fabric);
void enter_error(Qp& qp);

}  // namespace rkv::verbs::fake

namespace rkv::verbs {

struct FakeFabric::State {
  explicit State(FakeOptions given);
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State();

  fake::Device& device(const std::string& name);
  void wake_at(fake::Clock::time_point when);

  FakeOptions options;
  mutable std::mutex mutex;
  std::condition_variable acked;    // An event was acknowledged.
  std::condition_variable changed;  // `wake` is earlier now, or the fabric is going.
  std::deque<fake::Device> devices;
  std::mt19937_64 random;
  std::size_t live_objects = 0;
  bool overflowed = false;
  bool rescan = false;             // A QP other than the one being advanced has work to do.
  bool receivers_awaited = false;  // A sender waits for a receive to be posted.
  bool stopping = false;
  fake::Clock::time_point wake = fake::Clock::time_point::max();
  std::thread thread;  // Timeouts and deferred delivery.

 private:
  void run();
};

}  // namespace rkv::verbs
