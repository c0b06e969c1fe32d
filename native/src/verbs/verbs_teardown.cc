// SPDX-License-Identifier: Apache-2.0
/// How peers end: closed, failed, or with the rail they were on.
#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "verbs/verbs_backend.h"

namespace rkv::verbs {
namespace {

/// Usually it takes less than a millisecond; heartbeats must not wait longer than this.
constexpr std::chrono::milliseconds kDestroyPatience{100};

}  // namespace

void VerbsBackend::close_peer(PeerId id) {
  const auto found = peers_.find(id);
  if (found == peers_.end()) return;
  auto channels = std::move(found->second.channels);
  peers_.erase(found);
  destroy_channels(std::move(channels));
  std::erase_if(completions_, [id](const Completion& done) { return done.peer == id; });
}

/// The fence: a stopped QP accepts no packet, a destroyed one reads no memory either. Destroying
/// may take as long as packets of it are stuck on the way out (Soft-RoCE and a peer that stopped
/// receiving: for ever), so it has a thread of its own, for which this waits a little.
void VerbsBackend::destroy_channels(std::vector<std::unique_ptr<Channel>> channels) {
  if (channels.empty()) return;
  Reap reap{.wrs = std::vector<std::uint32_t>(rails_.size())};
  for (const auto& channel : channels) {
    channel->qp.stop();
    by_serial_.erase(channel->serial);
    rail_states_[channel->rail].by_qp_number.erase(channel->qp.address().number);
    reap.wrs[channel->rail] += channel->queue.outstanding_wrs();
  }
  // The rails stay for as long as QPs are on them, even if the backend goes first.
  std::packaged_task<void()> destroy([rails = rails_, doomed = std::move(channels)]() mutable {
    doomed.clear();
    rails.clear();
  });
  reap.done = destroy.get_future();
  std::thread(std::move(destroy)).detach();
  reap.done.wait_for(kDestroyPatience);
  reaps_.push_back(std::move(reap));
  collect_reaped();
}

/// Gives back what destroyed QPs held. Their CQEs may still be in the CQs (they stay on Soft-RoCE),
/// so these are emptied first.
void VerbsBackend::collect_reaped() {
  std::erase_if(reaps_, [this](const Reap& reap) {
    if (reap.done.wait_for(std::chrono::seconds(0)) != std::future_status::ready) return false;
    for (std::size_t rail = 0; rail < rails_.size(); ++rail) {
      drain(rail, kDrainAll);
      rails_[rail]->return_cqes(reap.wrs[rail]);
    }
    return true;
  });
}

void VerbsBackend::take_async_events(std::size_t rail) {
  ibv_async_event event{};
  while (rails_[rail]->take_async_event(event)) {
    ++counters_.async_events;
    on_async_event(rail, event);
    lib_.ack_async_event(&event);
  }
}

void VerbsBackend::on_async_event(std::size_t rail, const ibv_async_event& event) {
  const std::string text = rails_[rail]->name() + ": " + lib_.event_type_str(event.event_type);
  switch (event.event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_PATH_MIG_ERR: {
      const auto& by_number = rail_states_[rail].by_qp_number;
      const auto found = by_number.find(event.element.qp->qp_num);
      if (found != by_number.end()) {
        fail(found->second->peer, text + ": the peer wrote where it may not, or the QP broke");
      }
      return;
    }
    case IBV_EVENT_PORT_ERR:
      rail_states_[rail].port_down = true;  // a cable may come back before the retries are over
      return;
    case IBV_EVENT_PORT_ACTIVE:
      rail_states_[rail].port_down = false;
      return;
    case IBV_EVENT_CQ_ERR:
    case IBV_EVENT_SRQ_ERR:
    case IBV_EVENT_DEVICE_FATAL:
      fail_rail(rail, text + "; see the kernel log");
      return;
    default:
      return;
  }
}

std::string VerbsBackend::channel_text(const Channel& channel) const {
  return rails_[channel.rail]->name() + " QP " + std::to_string(channel.qp.address().number) +
         channel.path_text;
}

/// Reported once; the engine answers with close_peer().
void VerbsBackend::fail(PeerId id, const std::string& reason) {
  const auto found = peers_.find(id);
  if (found == peers_.end() || std::exchange(found->second.failed, true)) return;
  completions_.push_back({.kind = Completion::Kind::kPeerError, .peer = id, .reason = reason});
}

void VerbsBackend::fail_rail(std::size_t rail, const std::string& reason) {
  for (const auto& [id, peer] : peers_) {
    const bool uses = std::any_of(peer.channels.begin(), peer.channels.end(),
                                  [rail](const auto& channel) { return channel->rail == rail; });
    if (uses) fail(id, reason);
  }
}

}  // namespace rkv::verbs
