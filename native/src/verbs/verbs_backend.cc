// SPDX-License-Identifier: Apache-2.0
/// Set-up and tear-down of the verbs backend; posting and polling are in verbs_datapath.cc.
#include "verbs/verbs_backend.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

#include "core/error.h"
#include "verbs/subnet.h"

namespace rkv::verbs {
namespace {

constexpr std::uint32_t kMinSendWrs = 128;   ///< Of one QP's send queue.
constexpr std::uint32_t kMaxSendWrs = 4096;  ///< More needs megabytes a QP and gains nothing.
static_assert(2 * kMaxChainWrs <= kMinSendWrs, "one chain must be built while another is sent");
static_assert(kMaxSendWrs <= kSendCqDepth, "one QP must be able to fill its send queue");

/// Usually it takes less than a millisecond; heartbeats must not wait longer than this.
constexpr std::chrono::milliseconds kDestroyPatience{100};
/// After activity the thread polls this long before it sleeps.
constexpr std::chrono::microseconds kSpin{100};
constexpr int kSubnetPrefixBytes = 8;  ///< Of an InfiniBand GID.
constexpr int kDrainAll = std::numeric_limits<int>::max();

std::string address_text(const RailAddress& address) {
  if (address.link_layer == LinkLayer::kInfiniBand) return "LID " + std::to_string(address.lid);
  return Gid{.raw = address.gid, .type = address.gid_type}.text();
}

/// "0-3,8" as sysfs writes it. @return {0, 1, 2, 3, 8}; nothing for what it does not understand.
std::vector<std::size_t> parse_cpu_list(const std::string& text) {
  std::vector<std::size_t> cpus;
  std::istringstream ranges(text);
  for (std::string range; std::getline(ranges, range, ',');) {
    std::size_t first = 0;
    std::size_t last = 0;
    const int fields = std::sscanf(range.c_str(), "%zu-%zu", &first, &last);
    if (fields < 1) return {};
    if (fields == 1) last = first;
    for (std::size_t cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

}  // namespace

VerbsBackend::VerbsBackend(const EngineConfig& config, const Ibverbs& lib, Choice choice)
    : lib_(lib),
      choice_(std::move(choice)),
      block_size_(static_cast<std::uint64_t>(config.block_size)),
      peer_timeout_(config.peer_timeout()),
      traffic_class_(static_cast<std::uint8_t>(config.traffic_class)),
      service_level_(static_cast<std::uint8_t>(config.service_level)),
      local_keys_(choice_.ports.size()),
      rail_states_(choice_.ports.size()) {
  std::uint32_t device_wrs = kMaxSendWrs;
  for (const ChosenPort& chosen : choice_.ports) {
    rails_.push_back(std::make_shared<Rail>(lib_, chosen.port.device,
                                            static_cast<std::uint8_t>(chosen.port.number)));
    device_wrs =
        std::min(device_wrs, static_cast<std::uint32_t>(rails_.back()->limits().max_qp_wr));
  }
  const auto qps = static_cast<std::size_t>(config.qps_per_peer);
  qps_per_rail_ = (qps + rails_.size() - 1) / rails_.size();
  send_wrs_ =
      std::min(device_wrs, std::max(kMinSendWrs, static_cast<std::uint32_t>(config.queue_depth)));
}

VerbsBackend::~VerbsBackend() = default;

std::chrono::microseconds VerbsBackend::default_spin() const { return kSpin; }

std::vector<std::size_t> VerbsBackend::cpus() const {
  return parse_cpu_list(choice_.ports.front().port.local_cpus);
}

void VerbsBackend::attach(EventLoop& loop) {
  for (std::size_t i = 0; i < rails_.size(); ++i) {
    Rail& rail = *rails_[i];
    loop.watch(rail.completion_fd(), EPOLLIN,
               [&rail](std::uint32_t /*events*/) { rail.take_completion_events(); });
    loop.watch(rail.async_fd(), EPOLLIN,
               [this, i](std::uint32_t /*events*/) { take_async_events(i); });
  }
}

std::unique_ptr<PinnedMemory> VerbsBackend::pin_memory(const MemoryRange& range,
                                                       const MemoryUse& use) {
  return std::make_unique<Registration>(rails_, range, use, block_size_, pinned_);
}

Bytes VerbsBackend::register_memory(RegionId region, MemoryRange /*range*/, MemoryUse use,
                                    std::unique_ptr<PinnedMemory> pinned) {
  std::unique_ptr<Registration> registration(static_cast<Registration*>(pinned.release()));
  ByteWriter writer;
  writer.put(static_cast<std::uint8_t>(rails_.size()));
  for (std::size_t rail = 0; rail < rails_.size(); ++rail) {
    local_keys_[rail][region] = registration->local_keys(rail);
    registration->remote_keys(rail).encode(writer);
  }
  registrations_[region] = std::move(registration);
  return use.peer_writable ? writer.take() : Bytes{};
}

std::unique_ptr<PinnedMemory> VerbsBackend::deregister_memory(RegionId region) {
  for (KeysByRegion& keys : local_keys_) keys.erase(region);
  const auto found = registrations_.find(region);
  if (found == registrations_.end()) return nullptr;
  std::unique_ptr<PinnedMemory> registration = std::move(found->second);
  registrations_.erase(found);
  return registration;
}

Bytes VerbsBackend::create_endpoint(PeerId id) {
  Peer peer;
  std::vector<RailEndpoint> endpoints;
  for (std::size_t rail = 0; rail < rails_.size(); ++rail) {
    RailEndpoint endpoint{.address = own_address(rail)};
    for (std::size_t i = 0; i < qps_per_rail_; ++i) {
      auto channel = std::make_unique<Channel>(id, next_serial_++, rail, *rails_[rail], send_wrs_);
      endpoint.qps.push_back(channel->qp.address());
      peer.channels.push_back(std::move(channel));
    }
    endpoints.push_back(std::move(endpoint));
  }
  peer.blob = encode_endpoint(endpoints);
  // Of an earlier QP with one of these numbers there may still be CQEs.
  for (std::size_t rail = 0; rail < rails_.size(); ++rail) drain(rail, kDrainAll);
  for (const auto& channel : peer.channels) {
    by_serial_[channel->serial] = channel.get();
    rail_states_[channel->rail].by_qp_number[channel->qp.address().number] = channel.get();
  }
  return (peers_[id] = std::move(peer)).blob;
}

RailAddress VerbsBackend::own_address(std::size_t rail) const {
  const ChosenPort& chosen = choice_.ports[rail];
  const bool infiniband = chosen.port.link_layer == LinkLayer::kInfiniBand;
  const ibv_port_attr& attributes = rails_[rail]->port_attributes();
  return {.link_layer = chosen.port.link_layer,
          .gid = chosen.gid.raw,
          .gid_type = chosen.gid.type,
          .lid = attributes.lid,
          .mtu = static_cast<std::uint8_t>(attributes.active_mtu),
          .rate_gbps = chosen.port.rate_gbps,
          .subnet_bits = infiniband ? 8 * kSubnetPrefixBytes : subnet_bits(chosen.gid)};
}

void VerbsBackend::connect(PeerId id, PeerLink link) {
  Peer& peer = peers_.at(id);
  const std::vector<RailEndpoint> remote = decode_endpoint(link.blob);
  peer.remote_keys = decode_memory(link.memory, remote.size(), block_size_);
  connect_rails(peer, remote);
}

void VerbsBackend::connect_rails(Peer& peer, const std::vector<RailEndpoint>& remote) {
  std::vector<RailAddress> own_addresses;
  std::vector<RailAddress> remote_addresses;
  for (std::size_t rail = 0; rail < rails_.size(); ++rail) {
    own_addresses.push_back(own_address(rail));
  }
  for (const RailEndpoint& endpoint : remote) remote_addresses.push_back(endpoint.address);
  const std::vector<RailPair> pairs = pair_rails(own_addresses, remote_addresses);
  std::vector<std::size_t> own_used(rails_.size());
  std::vector<std::size_t> remote_used(remote.size());
  // A QP for each pair, then another for each, while both ends have some: both count alike.
  for (bool more = true; std::exchange(more, false);) {
    for (const auto& [own, other] : pairs) {
      if (own_used[own] == qps_per_rail_ || remote_used[other] == remote[other].qps.size())
        continue;
      Channel& channel = *peer.channels[own * qps_per_rail_ + own_used[own]++];
      channel.path_text = " to " + address_text(remote_addresses[other]);
      channel.qp.connect(remote[other].qps[remote_used[other]++],
                         path_to(own, remote_addresses[other]));
      channel.remote_rail = other;
      channel.remote_keys = &peer.remote_keys[other];
      more = true;
    }
  }
  const auto unused =
      std::stable_partition(peer.channels.begin(), peer.channels.end(),
                            [](const auto& channel) { return channel->remote_keys != nullptr; });
  std::vector<std::unique_ptr<Channel>> spare(std::make_move_iterator(unused),
                                              std::make_move_iterator(peer.channels.end()));
  peer.channels.erase(unused, peer.channels.end());
  destroy_channels(std::move(spare));
}

Path VerbsBackend::path_to(std::size_t rail, const RailAddress& remote) const {
  const ibv_port_attr& attributes = rails_[rail]->port_attributes();
  const bool ethernet = attributes.link_layer == IBV_LINK_LAYER_ETHERNET;
  const auto& own_gid = choice_.ports[rail].gid.raw;
  const bool routed =
      !std::equal(own_gid.begin(), own_gid.begin() + kSubnetPrefixBytes, remote.gid.begin());
  const bool needs_grh = (attributes.flags & IBV_QPF_GRH_REQUIRED) != 0;
  return {.global = ethernet || needs_grh || routed,
          .gid = remote.gid,
          .own_gid_index = static_cast<std::uint8_t>(choice_.ports[rail].gid.index),
          .lid = remote.lid,
          .mtu = static_cast<ibv_mtu>(
              std::min(static_cast<std::uint8_t>(attributes.active_mtu), remote.mtu)),
          .traffic_class = traffic_class_,
          .service_level = service_level_,
          .ack_timeout = ack_timeout_exponent(peer_timeout_)};
}

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

void VerbsBackend::add_stats(Stats& stats) const {
  stats["verbs_wrs"] = counters_.wrs;
  stats["verbs_sges"] = counters_.sges;
  stats["verbs_doorbells"] = counters_.doorbells;
  stats["verbs_cqes"] = counters_.cqes;
  stats["verbs_probes"] = counters_.probes;
  stats["verbs_posts_refused"] = counters_.posts_refused;
  stats["verbs_async_events"] = counters_.async_events;
  stats["verbs_qps"] = std::uint64_t{by_serial_.size()};
  stats["pinned_bytes"] = pinned_.load();
  for (std::size_t rail = 0; rail < rails_.size(); ++rail) {
    stats["bytes_posted_" + rails_[rail]->name()] = rail_states_[rail].bytes_posted;
  }
}

}  // namespace rkv::verbs
