// SPDX-License-Identifier: Apache-2.0
/// Set-up and tear-down of the tcp backend; posting and progress are in tcp_datapath.cc.
#include "tcp/tcp_backend.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "core/endpoint_descriptor.h"
#include "core/wire.h"

namespace rkv::tcp {

std::unique_ptr<PinnedMemory> TcpBackend::pin_memory(const MemoryRange& /*range*/,
                                                     const MemoryUse& use) {
  if (use.kind != MemoryKind::kHost) {
    throw std::invalid_argument("register_memory(): backend 'tcp' reaches host memory only");
  }
  return nullptr;  // plain socket calls need no pinned pages
}

Bytes TcpBackend::register_memory(RegionId region, MemoryRange range, MemoryUse use,
                                  std::unique_ptr<PinnedMemory> /*pinned*/) {
  if (!use.peer_writable) return {};
  const std::uint64_t key = random_u64();
  keys_[key] = range;
  key_of_[region] = key;
  ByteWriter writer;
  writer.put(key);
  return writer.take();
}

std::unique_ptr<PinnedMemory> TcpBackend::deregister_memory(RegionId region) {
  const auto found = key_of_.find(region);
  if (found == key_of_.end()) return nullptr;
  const MemoryRange range = keys_.at(found->second);
  keys_.erase(found->second);
  key_of_.erase(found);
  for (const auto& [id, peer] : peers_) {
    const bool landing = std::any_of(peer.lanes.begin(), peer.lanes.end(),
                                     [&](const auto& lane) { return lane->is_landing_in(range); });
    if (landing) fail(id, "memory was deregistered while a write of it landed");
  }
  return nullptr;
}

Bytes TcpBackend::create_endpoint(PeerId /*peer*/) { return {}; }

void TcpBackend::connect(PeerId id, PeerLink link) {
  Peer peer;
  for (const RemoteMemory& memory : link.memory) {
    ByteReader reader(memory.blob);
    peer.keys.push_back(reader.get<std::uint64_t>("key"));
    reader.expect_end();
  }
  for (std::size_t i = 0; i < link.sockets.size(); ++i) {
    peer.lanes.push_back(std::make_unique<Lane>(
        *loop_, std::move(link.sockets[i]), keys_, stats_,
        [this, id, i](std::uint32_t events) { on_lane_ready(id, i, events); }));
  }
  peers_[id] = std::move(peer);
}

/// The lanes are authenticated connections and the engine's heartbeat runs beside them; a socket
/// that broke says so itself.
void TcpBackend::probe(PeerId id) {
  Peer& peer = peers_.at(id);
  if (std::exchange(peer.probed, true)) return;
  completions_.push_back({.kind = Completion::Kind::kReachable, .peer = id});
}

void TcpBackend::close_peer(PeerId id) {
  peers_.erase(id);
  std::erase_if(completions_, [id](const Completion& done) { return done.peer == id; });
}

/// All lanes fall together. They are closed by close_peer(), after the engine told the peer why.
void TcpBackend::fail(PeerId id, const std::string& reason) {
  Peer& peer = peers_.at(id);
  if (std::exchange(peer.failed, true)) return;
  for (const auto& lane : peer.lanes) lane->stop();
  completions_.push_back({.kind = Completion::Kind::kPeerError, .peer = id, .reason = reason});
}

void TcpBackend::add_stats(Stats& stats) const {
  stats["tcp_frames_sent"] = stats_.frames_sent;
  stats["tcp_frames_landed"] = stats_.frames_landed;
  stats["tcp_send_calls"] = stats_.send_calls;
  stats["tcp_send_blocked"] = stats_.send_blocked;
  stats["tcp_receive_calls"] = stats_.receive_calls;
  stats["bytes_received"] = stats_.bytes_received;
}

}  // namespace rkv::tcp
