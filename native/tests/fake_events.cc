// SPDX-License-Identifier: Apache-2.0
/// Completion channels and asynchronous events: ibv_get_cq_event(3), ibv_get_async_event(3).
#include <cstdio>
#include <cstdlib>

#include "fake_objects.h"

namespace rkv::verbs::fake {
namespace {

constexpr std::chrono::seconds kAckPatience{10};

/// "destroying a CQ will wait for all completion events to be acknowledged", ibv_get_cq_event(3),
/// and so for async events. For ever, there; a test ends with the reason instead.
template <class Predicate>
void wait_for_acks(Fabric& fabric, std::unique_lock<std::mutex>& lock, const char* what,
                   Predicate all_acked) {
  if (fabric.acked.wait_until(lock, std::chrono::system_clock::now() + kAckPatience, all_acked)) {
    return;
  }
  std::fprintf(stderr, "fake RDMA: destroying a %s whose events are not acknowledged\n", what);
  std::abort();
}

bool is_cq_event(ibv_event_type type) { return type == IBV_EVENT_CQ_ERR; }
bool is_port_event(ibv_event_type type) {
  return type == IBV_EVENT_PORT_ACTIVE || type == IBV_EVENT_PORT_ERR;
}

void count_got(const ibv_async_event& event) {
  if (is_port_event(event.event_type)) return;
  if (is_cq_event(event.event_type)) {
    ++cq_of(event.element.cq).async_events_got;
  } else {
    ++qp_of(event.element.qp).async_events_got;
  }
}

}  // namespace

ibv_comp_channel* create_comp_channel(ibv_context* context) {
  Fabric& fabric = fabric_of(context);
  const std::lock_guard lock(fabric.mutex);
  auto* channel = new Channel();
  channel->context = context;
  channel->fd = channel->events.fd();
  channel->refcnt = 0;
  ++context_of(context).users;
  ++fabric.live_objects;
  return channel;
}

int destroy_comp_channel(ibv_comp_channel* base) {
  Fabric& fabric = fabric_of(base->context);
  const std::lock_guard lock(fabric.mutex);
  // "fails if any CQs are still associated with the completion event channel"
  if (base->refcnt > 0) return EBUSY;
  --context_of(base->context).users;
  --fabric.live_objects;
  delete static_cast<Channel*>(base);
  return 0;
}

int get_cq_event(ibv_comp_channel* base, ibv_cq** cq, void** cq_context) {
  auto& channel = *static_cast<Channel*>(base);
  while (channel.events.wait()) {
    const std::lock_guard lock(fabric_of(base->context).mutex);
    const std::optional<Cq*> event = channel.events.pop();
    if (!event) continue;
    ++(*event)->comp_events_got;
    *cq = *event;
    *cq_context = (*event)->cq_context;
    return 0;
  }
  return -1;
}

void ack_cq_events(ibv_cq* cq, unsigned int count) {
  Fabric& fabric = fabric_of(cq->context);
  const std::lock_guard lock(fabric.mutex);
  cq->comp_events_completed += count;
  fabric.acked.notify_all();
}

int req_notify_cq(ibv_cq* base, int solicited_only) {
  const std::lock_guard lock(fabric_of(base->context).mutex);
  Cq& cq = cq_of(base);
  // Asking for any CQE outlasts a later request for solicited ones alone, until the event.
  cq.solicited_only = solicited_only != 0 && (!cq.armed || cq.solicited_only);
  cq.armed = true;
  return 0;
}

void notify(Cq& cq, bool solicited) {
  if (!cq.armed || (cq.solicited_only && !solicited)) return;
  cq.armed = false;
  if (cq.channel != nullptr) static_cast<Channel*>(cq.channel)->events.push(&cq);
}

int get_async_event(ibv_context* base, ibv_async_event* out) {
  Context& context = context_of(base);
  while (context.events.wait()) {
    const std::lock_guard lock(fabric_of(base).mutex);
    const std::optional<ibv_async_event> event = context.events.pop();
    if (!event) continue;
    count_got(*event);
    *out = *event;
    return 0;
  }
  return -1;
}

void ack_async_event(ibv_async_event* event) {
  if (is_port_event(event->event_type)) return;
  const bool of_cq = is_cq_event(event->event_type);
  Fabric& fabric = fabric_of(of_cq ? event->element.cq->context : event->element.qp->context);
  const std::lock_guard lock(fabric.mutex);
  ++(of_cq ? event->element.cq->async_events_completed : event->element.qp->events_completed);
  fabric.acked.notify_all();
}

void raise_event(Qp& qp, ibv_event_type type) {
  ibv_async_event event{};
  event.element.qp = &qp;
  event.event_type = type;
  context_of(qp.context).events.push(event);
}

void raise_event(Cq& cq, ibv_event_type type) {
  ibv_async_event event{};
  event.element.cq = &cq;
  event.event_type = type;
  context_of(cq.context).events.push(event);
}

void raise_event(Device& device, ibv_event_type type) {
  ibv_async_event event{};
  event.element.port_num = 1;
  event.event_type = type;
  for (Context* context : device.contexts) context->events.push(event);
}

void settle_events(Qp& qp, std::unique_lock<std::mutex>& lock) {
  context_of(qp.context).events.discard([&](const ibv_async_event& event) {
    return !is_port_event(event.event_type) && !is_cq_event(event.event_type) &&
           event.element.qp == &qp;
  });
  wait_for_acks(fabric_of(qp.context), lock, "QP",
                [&] { return qp.events_completed == qp.async_events_got; });
}

void settle_events(Cq& cq, std::unique_lock<std::mutex>& lock) {
  if (cq.channel != nullptr) {
    static_cast<Channel*>(cq.channel)->events.discard([&](const Cq* event) {
      return event == &cq;
    });
  }
  context_of(cq.context).events.discard([&](const ibv_async_event& event) {
    return is_cq_event(event.event_type) && event.element.cq == &cq;
  });
  wait_for_acks(fabric_of(cq.context), lock, "CQ", [&] {
    return cq.comp_events_completed == cq.comp_events_got &&
           cq.async_events_completed == cq.async_events_got;
  });
}

// The texts of libibverbs.
const char* wc_status_str(ibv_wc_status status) {
  static constexpr std::array kTexts = {"success",
                                        "local length error",
                                        "local QP operation error",
                                        "local EE context operation error",
                                        "local protection error",
                                        "Work Request Flushed Error",
                                        "memory management operation error",
                                        "bad response error",
                                        "local access error",
                                        "remote invalid request error",
                                        "remote access error",
                                        "remote operation error",
                                        "transport retry counter exceeded",
                                        "RNR retry counter exceeded",
                                        "local RDD violation error",
                                        "remote invalid RD request",
                                        "aborted error",
                                        "invalid EE context number",
                                        "invalid EE context state",
                                        "fatal error",
                                        "response timeout error",
                                        "general error"};
  return status < kTexts.size() ? kTexts[status] : "unknown";
}

const char* event_type_str(ibv_event_type type) {
  switch (type) {
    case IBV_EVENT_CQ_ERR:
      return "CQ error";
    case IBV_EVENT_QP_REQ_ERR:
      return "QP request error";
    case IBV_EVENT_QP_ACCESS_ERR:
      return "local access violation work queue error";
    case IBV_EVENT_COMM_EST:
      return "communication established";
    case IBV_EVENT_PORT_ACTIVE:
      return "port active";
    case IBV_EVENT_PORT_ERR:
      return "port error";
    case IBV_EVENT_QP_LAST_WQE_REACHED:
      return "last WQE reached";
    default:
      return "unknown";
  }
}

}  // namespace rkv::verbs::fake
