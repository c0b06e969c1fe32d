// SPDX-License-Identifier: Apache-2.0
/// Set-up of the verbs backend; see also verbs_datapath.cc and verbs_teardown.cc.
#include "verbs/verbs_backend.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "core/error.h"
#include "verbs/subnet.h"

namespace rkv::verbs {
namespace {

constexpr std::uint32_t kMinSendWrs = 128;   ///< Of one QP's send queue.
constexpr std::uint32_t kMaxSendWrs = 4096;  ///< More needs megabytes a QP and gains nothing.
static_assert(2 * kMaxChainWrs <= kMinSendWrs, "one chain must be built while another is sent");
static_assert(kMaxSendWrs <= kSendCqDepth, "one QP must be able to fill its send queue");

/// After activity the thread polls this long before it sleeps.
constexpr std::chrono::microseconds kSpin{100};
constexpr int kSubnetPrefixBytes = 8;  ///< Of an InfiniBand GID.

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

VerbsBackend::VerbsBackend(const EngineConfig& config, const Ibverbs& lib, Choice choice,
                           const cuda::Cuda& (*load_cuda)())
    : lib_(lib),
      load_cuda_(load_cuda),
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
  std::shared_ptr<const cuda::Gpu> gpu;
  if (use.kind == MemoryKind::kCuda) {
    const cuda::Cuda& cuda = load_cuda_();
    gpu = std::make_shared<const cuda::Gpu>(cuda, cuda::device_of(cuda, range.address));
  }
  return std::make_unique<Registration>(rails_, range, use, block_size_, pinned_, std::move(gpu));
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
  list_gpus_to_flush();
  return use.peer_writable ? writer.take() : Bytes{};
}

std::unique_ptr<PinnedMemory> VerbsBackend::deregister_memory(RegionId region) {
  for (KeysByRegion& keys : local_keys_) keys.erase(region);
  const auto found = registrations_.find(region);
  if (found == registrations_.end()) return nullptr;
  std::unique_ptr<PinnedMemory> registration = std::move(found->second);
  registrations_.erase(found);
  list_gpus_to_flush();
  return registration;
}

void VerbsBackend::list_gpus_to_flush() {
  gpus_to_flush_.clear();
  for (const auto& [region, registration] : registrations_) {
    auto gpu = registration->gpu_to_flush();
    const bool is_new =
        gpu && std::none_of(gpus_to_flush_.begin(), gpus_to_flush_.end(),
                            [&](const auto& listed) { return listed->device() == gpu->device(); });
    if (is_new) gpus_to_flush_.push_back(std::move(gpu));
  }
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

rkv::Path VerbsBackend::path(PeerId id) const {
  std::set<std::string> ways;  // a rail may have several QPs
  for (const auto& channel : peers_.at(id).channels) {
    ways.insert(rails_[channel->rail]->name() + channel->path_text);
  }
  std::string text;
  for (const std::string& way : ways) text += (text.empty() ? "verbs: " : ", ") + way;
  return {.backend = "verbs", .description = text};
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

void VerbsBackend::add_stats(Stats& stats) const {
  stats["verbs_wrs"] = counters_.wrs;
  stats["verbs_sges"] = counters_.sges;
  stats["verbs_doorbells"] = counters_.doorbells;
  stats["verbs_cqes"] = counters_.cqes;
  stats["verbs_probes"] = counters_.probes;
  stats["verbs_posts_refused"] = counters_.posts_refused;
  stats["verbs_async_events"] = counters_.async_events;
  stats["verbs_gpu_flushes"] = counters_.gpu_flushes;
  stats["verbs_qps"] = std::uint64_t{by_serial_.size()};
  stats["pinned_bytes"] = pinned_.load();
  for (std::size_t rail = 0; rail < rails_.size(); ++rail) {
    stats["bytes_posted_" + rails_[rail]->name()] = rail_states_[rail].bytes_posted;
  }
}

}  // namespace rkv::verbs
