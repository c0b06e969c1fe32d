// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/backend.h"
#include "tcp/lane.h"

namespace rkv::tcp {

/// One-sided writes over plain TCP, for hosts without an HCA; nothing to install.
///
/// Only this process's own readv puts bytes into registered memory, so fencing a peer or a region
/// is local: take the sockets or the key away on the progress thread, and nothing lands any more.
/// Set-up is in tcp_backend.cc, the data path in tcp_datapath.cc.
class TcpBackend final : public Backend {
 public:
  explicit TcpBackend(std::uint8_t lanes) : lanes_(lanes) {}

  [[nodiscard]] std::string_view name() const override { return "tcp"; }
  [[nodiscard]] std::uint8_t lanes() const override { return lanes_; }
  void attach(EventLoop& loop) override { loop_ = &loop; }
  [[nodiscard]] std::unique_ptr<PinnedMemory> pin_memory(const MemoryRange& range,
                                                         const MemoryUse& use) override;
  Bytes register_memory(RegionId region, MemoryRange range, MemoryUse use,
                        std::unique_ptr<PinnedMemory> pinned) override;
  [[nodiscard]] std::unique_ptr<PinnedMemory> deregister_memory(RegionId region) override;
  Bytes create_endpoint(PeerId peer) override;
  void connect(PeerId peer, PeerLink link) override;
  void probe(PeerId peer) override;
  Posted post_writes(PeerId peer, TransferId transfer, std::span<const WriteSlice> slices,
                     std::optional<std::uint32_t> imm) override;
  bool post_signal(PeerId peer, std::uint32_t imm) override;
  void close_peer(PeerId peer) override;
  bool progress(std::vector<Completion>& completions) override;
  void add_stats(Stats& stats) const override;

 private:
  struct Peer {
    std::vector<std::uint64_t> keys;  // by remote region
    std::vector<std::unique_ptr<Lane>> lanes;
    std::deque<Signal> signals;  // received, waiting for writes on other lanes
    bool probed = false;         // and so reported reachable
    bool failed = false;         // reported; its lanes are stopped
  };

  void on_lane_ready(PeerId peer, std::size_t lane, std::uint32_t epoll_events);
  void receive(PeerId id, Peer& peer, Lane& lane);
  void deliver_signals(PeerId id, Peer& peer);
  void fail(PeerId peer, const std::string& reason);

  const std::uint8_t lanes_;
  EventLoop* loop_ = nullptr;
  KeyTable keys_;
  std::unordered_map<RegionId, std::uint64_t> key_of_;
  LaneStats stats_;
  std::unordered_map<PeerId, Peer> peers_;
  std::vector<Completion> completions_;
  Inbox inbox_;
};

}  // namespace rkv::tcp
