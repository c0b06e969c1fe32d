// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/acceptor.h"
#include "core/backend.h"
#include "core/config.h"
#include "core/connection.h"
#include "core/dialer.h"
#include "core/event_loop.h"
#include "core/event_queue.h"
#include "core/marks.h"
#include "core/turn.h"

namespace rkv {

/// The engine's progress: connections, liveness, the backend, and the thread that keeps them going.
///
/// Everything here happens in turns, one at a time. Mostly they are the progress thread's. While
/// it sleeps a caller may take one itself, which spares a small transfer two hand-overs between
/// threads, tens of microseconds each. start(), stop() and what says so may be called from any
/// thread; every other method is called in a turn, as a queued command. Reports of a peer's end
/// from the backend and from its control connection join in lose(); the first wins.
class Progress {
 public:
  /// Called once per lost peer, on the progress thread, before its last events are queued: from
  /// its return on nothing more may be posted for that peer.
  using OnLost = std::function<void(PeerId, const std::string& reason)>;

  /// Listens at once. `marks` outlives it. @throw std::runtime_error
  Progress(const EngineConfig& config, std::uint64_t incarnation, std::unique_ptr<Backend> backend,
           const Marks& marks, EventQueue& events, OnLost on_lost);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void start();
  /// Says goodbye to every peer, fences it, fails its writes, and joins. Commands posted before
  /// still run; none may be posted after.
  void stop();

  /// Queues `command` for the next turn. Any thread; take_turn() or wake() must follow.
  void queue(EventLoop::Command command) { loop_.queue(std::move(command)); }
  /// Any thread.
  void wake() { loop_.wake(); }
  /// Runs the queued commands and what follows from them, here if the progress thread sleeps and
  /// there otherwise. Any thread that holds no lock which Progress::OnLost takes.
  /// @return whether here.
  bool take_turn() noexcept;
  /// Looks for data on the caller's thread. For a moment the progress thread leaves that to the
  /// caller: two that look for the same completion cost more than one. Any thread.
  void attend() noexcept;
  /// The caller looks no longer.
  void leave() noexcept;
  /// How long a caller attends before it sleeps.
  [[nodiscard]] std::chrono::microseconds caller_spin() const {
    return backend_->polls() ? spin_ : std::chrono::microseconds(0);
  }

  [[nodiscard]] const SocketAddress& address() const { return acceptor_.address(); }
  [[nodiscard]] std::string_view backend_name() const { return backend_->name(); }
  [[nodiscard]] std::uint8_t lanes() const { return backend_->lanes(); }
  [[nodiscard]] std::string describe() const { return backend_->describe(); }
  [[nodiscard]] std::uint64_t small_write() const { return backend_->small_write(); }
  /// Any thread.
  [[nodiscard]] std::unique_ptr<PinnedMemory> pin_memory(const MemoryRange& range,
                                                         const MemoryUse& use) {
    return backend_->pin_memory(range, use);
  }

  Bytes register_memory(RegionId region, MemoryRange range, MemoryUse use,
                        std::unique_ptr<PinnedMemory> pinned);
  [[nodiscard]] std::unique_ptr<PinnedMemory> deregister_memory(RegionId region);
  Bytes create_endpoint(PeerId peer, const std::string& label, const Token& token);
  void connect(PeerId peer, const EndpointDescriptor& remote, std::vector<RemoteMemory> memory);
  void submit(PeerId peer, TransferId id, std::size_t rows, Slices slices,
              std::optional<std::uint32_t> imm, Mark after);
  void cancel(PeerId peer, const std::vector<TransferId>& ids);
  void signal(PeerId peer, std::uint32_t imm);
  void send(PeerId peer, Bytes message);
  void close_peer(PeerId peer, const std::string& why = "close_peer() was called");
  [[nodiscard]] Stats stats() const;
  [[nodiscard]] Stats peer_stats(PeerId peer) const;
  [[nodiscard]] Path peer_path(PeerId peer) const;

 private:
  void run();
  bool move_data();
  [[nodiscard]] bool waits_for_mark() const;
  [[nodiscard]] bool is_attended(Clock::time_point now) const;
  void move_to_cpus() const;
  bool post_queued();
  bool handle_completions();
  void handle(const Completion& completion);
  [[nodiscard]] std::chrono::milliseconds until_tick(Clock::time_point now) const;
  void tick(Clock::time_point now);
  void check_liveness(Connection& connection, Clock::time_point now);

  [[nodiscard]] Connection& get(PeerId peer) const;
  void on_socket(PeerId peer, std::uint8_t lane, UniqueFd fd);
  void establish(Connection& connection);
  void on_ready(Connection& connection);
  void mark_connected(Connection& connection);
  void lose(Connection& connection, std::string reason);
  void report_lost(Connection& connection);
  void detach(Connection& connection, const std::string& goodbye);
  void fail_outstanding(Connection& connection, const std::string& reason);
  void complete_transfer(Connection& connection, TransferId id, Clock::time_point posted_at);
  void fail_transfer(Connection& connection, TransferId id, const std::string& reason);

  const EngineConfig config_;
  const std::uint64_t incarnation_;
  const Marks& marks_;
  const Clock::duration tick_interval_;
  std::atomic<Clock::time_point> attended_until_{};  // by callers
  Turn turn_;                                        // guards all below but what any thread may use
  EventQueue& events_;
  OnLost on_lost_;
  EventLoop loop_;  // before all that watch file descriptors on it
  const std::unique_ptr<Backend> backend_;
  const std::chrono::microseconds spin_;
  Acceptor acceptor_;
  Dialer dialer_;
  std::unordered_map<PeerId, std::unique_ptr<Connection>> connections_;
  std::unordered_set<RegionId> regions_;
  std::vector<Completion> completions_;
  Clock::time_point next_tick_;
  bool stopping_ = false;
  std::thread thread_;

  struct Counters {
    std::uint64_t transfers = 0;
    std::uint64_t transfers_done = 0;
    std::uint64_t transfers_failed = 0;
    std::uint64_t descriptors_in = 0;
    std::uint64_t descriptors_out = 0;
    std::uint64_t bytes_submitted = 0;
    std::uint64_t completions = 0;
    std::uint64_t signals_sent = 0;
    std::uint64_t imms_received = 0;
    std::uint64_t messages_sent = 0;
    std::uint64_t messages_received = 0;
    std::uint64_t peers_lost = 0;
    Clock::duration posting{};
  } counters_;
};

}  // namespace rkv
