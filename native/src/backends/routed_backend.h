// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/backend.h"

namespace rkv {

/// "auto": several backends behind one, and for each peer the first of them that reaches it.
///
/// Every backend that both sides have is connected; a side writes by the best one that can write
/// from there. Backends that cannot reach some registered memory drop out, with the reason kept.
class RoutedBackend final : public Backend {
 public:
  struct Member {
    std::unique_ptr<Backend> backend;  ///< Null: not usable on this host.
    std::string name;
    std::string missing = {};  ///< Why it is of no use here; empty if it is.
    bool has_hardware = true;  ///< Whether the host has what it is for.
  };

  /// `members`: fastest first.
  explicit RoutedBackend(std::vector<Member> members) : members_(std::move(members)) {}

  [[nodiscard]] std::string_view name() const override { return "auto"; }
  [[nodiscard]] std::uint8_t lanes() const override;
  /// The widest: a backend takes what it has room for.
  [[nodiscard]] std::size_t window(std::size_t queue_depth) const override;
  void attach(EventLoop& loop) override;
  [[nodiscard]] std::string describe() const override;
  [[nodiscard]] std::vector<std::size_t> cpus() const override;
  [[nodiscard]] bool polls() const override;
  [[nodiscard]] std::chrono::microseconds default_spin() const override;
  [[nodiscard]] std::uint64_t small_write() const override;
  [[nodiscard]] std::unique_ptr<PinnedMemory> pin_memory(const MemoryRange& range,
                                                         const MemoryUse& use) override;
  Bytes register_memory(RegionId region, MemoryRange range, MemoryUse use,
                        std::unique_ptr<PinnedMemory> pinned) override;
  [[nodiscard]] std::unique_ptr<PinnedMemory> deregister_memory(RegionId region) override;
  Bytes create_endpoint(PeerId peer) override;
  void connect(PeerId peer, PeerLink link) override;
  void probe(PeerId peer) override;
  [[nodiscard]] Path path(PeerId peer) const override;
  Posted post_writes(PeerId peer, TransferId transfer, std::span<const WriteSlice> slices,
                     std::optional<std::uint32_t> imm) override;
  bool post_signal(PeerId peer, std::uint32_t imm) override;
  void close_peer(PeerId peer) override;
  bool progress(std::vector<Completion>& completions) override;
  [[nodiscard]] bool arm() override;
  void add_stats(Stats& stats) const override;

 private:
  struct Peer {
    std::vector<Backend*> connected = {};
    Backend* writer = nullptr;
    Path path = {};
    std::size_t reachable = 0;
  };

  std::vector<Member> members_;
  std::unordered_map<PeerId, Peer> peers_;
};

}  // namespace rkv
