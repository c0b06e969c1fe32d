// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "core/config.h"
#include "paced/link.h"

namespace rkv::paced {

/// Another backend behind an emulated link, to measure what a slower network would cost.
///
/// The bytes move at once; that they have landed, and the signals behind them, are held until a
/// link of the given rate and latency would have delivered them. Each peer has a link of its own,
/// and each direction, since each end paces what it sends. A peer whose memory is looked at without
/// waiting for a signal sees bytes too early. The backend's own time is not added: what takes it
/// longer than the link is reported when it is there.
class PacedBackend final : public Backend {
 public:
  using Now = Clock::time_point (*)();

  /// `now` is for tests that do not wait.
  PacedBackend(std::unique_ptr<Backend> inner, Link link, Now now = &Clock::now);
  ~PacedBackend() override;

  [[nodiscard]] std::string_view name() const override { return inner_->name(); }
  [[nodiscard]] std::uint8_t lanes() const override { return inner_->lanes(); }
  [[nodiscard]] std::size_t window(std::size_t queue_depth) const override {
    return inner_->window(queue_depth);
  }
  void attach(EventLoop& loop) override;
  [[nodiscard]] std::string describe() const override;
  [[nodiscard]] std::vector<std::size_t> cpus() const override { return inner_->cpus(); }
  [[nodiscard]] bool polls() const override { return inner_->polls(); }
  [[nodiscard]] std::chrono::microseconds default_spin() const override {
    return inner_->default_spin();
  }
  [[nodiscard]] std::uint64_t small_write() const override { return inner_->small_write(); }
  [[nodiscard]] std::unique_ptr<PinnedMemory> pin_memory(const MemoryRange& range,
                                                         const MemoryUse& use) override {
    return inner_->pin_memory(range, use);
  }
  Bytes register_memory(RegionId region, MemoryRange range, MemoryUse use,
                        std::unique_ptr<PinnedMemory> pinned) override {
    return inner_->register_memory(region, range, use, std::move(pinned));
  }
  [[nodiscard]] std::unique_ptr<PinnedMemory> deregister_memory(RegionId region) override {
    return inner_->deregister_memory(region);
  }
  Bytes create_endpoint(PeerId peer) override { return inner_->create_endpoint(peer); }
  [[nodiscard]] bool accepts(std::string_view blob) const override { return inner_->accepts(blob); }
  void connect(PeerId peer, PeerLink link) override { inner_->connect(peer, std::move(link)); }
  void probe(PeerId peer) override { inner_->probe(peer); }
  [[nodiscard]] Path path(PeerId peer) const override;
  Posted post_writes(PeerId peer, TransferId transfer, std::span<const WriteSlice> slices,
                     std::optional<std::uint32_t> imm) override;
  bool post_signal(PeerId peer, std::uint32_t imm) override;
  void close_peer(PeerId peer) override;
  bool progress(std::vector<Completion>& completions) override;
  [[nodiscard]] bool arm() override;
  void add_stats(Stats& stats) const override { inner_->add_stats(stats); }

 private:
  /// Slices of one transfer that are reported together, or a signal.
  struct Held {
    Clock::time_point due = {};
    TransferId transfer = 0;
    std::size_t slices = 0;  ///< 0: a signal.
    std::uint32_t imm = 0;
  };

  /// One direction of the link to a peer.
  struct Lane {
    Clock::time_point free = {};  ///< When the last byte posted so far has left.
    std::deque<Held> held = {};   ///< In order of posting, and so of `due`.
    std::unordered_map<TransferId, std::size_t> landed = {};  ///< Slices, not yet reported.
    bool late = false;  ///< The front is due, and the inner backend has not done its part.

    /// @return false, with nothing changed, if they are not all there.
    bool take_landed(const Held& group);
  };

  void hold(Lane& lane, TransferId transfer, std::span<const WriteSlice> slices);
  bool release(PeerId peer, Lane& lane, Clock::time_point now,
               std::vector<Completion>& completions);
  [[nodiscard]] std::optional<Clock::time_point> next_due() const;
  void wake_for(Clock::time_point due);

  const std::unique_ptr<Backend> inner_;
  const Link link_;
  const Now now_;
  std::unordered_map<PeerId, Lane> lanes_;
  std::vector<Completion> reported_;  ///< By the inner backend.
  EventLoop* loop_ = nullptr;
  UniqueFd timer_;
  bool asleep_ = false;                         ///< The progress thread may be, since arm().
  std::optional<Clock::time_point> wakes_for_;  ///< What the timer is set for.
};

}  // namespace rkv::paced
