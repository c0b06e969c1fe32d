// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/config.h"
#include "core/endpoint_descriptor.h"
#include "core/event_queue.h"
#include "core/marks.h"
#include "core/progress.h"
#include "core/regions.h"
#include "core/slice_pool.h"

namespace rkv {

/// A registered region, as the application holds it.
struct RegisteredMemory {
  RegionId id = 0;
  MemoryRange range;
  Bytes descriptor;  ///< For peers; see Engine::connect(). Empty if they may not write.
};

struct CreatedEndpoint {
  PeerId peer = 0;
  Bytes descriptor;  ///< For the one peer that shall connect to it.
};

/// Moves bytes into the memory of peers. Knows addresses, not models.
///
/// Every method is thread-safe. API threads validate, coalesce, slice and queue; the rest happens
/// in turns, which the progress thread takes, or the calling thread while that one sleeps. Methods
/// that need an answer (memory, endpoints, close_peer, statistics) wait for it, for at most
/// kAnswerTimeout; the others but wait() never wait.
///
/// @throw std::invalid_argument for arguments that cannot be right, std::runtime_error for
/// everything that may happen to a correct program.
class Engine {
 public:
  /// `incarnation` distinguishes this engine from its predecessors on the same node; not 0.
  /// The progress thread starts and the engine listens before this returns.
  Engine(const EngineConfig& config, std::uint64_t incarnation, std::unique_ptr<Backend> backend,
         std::unique_ptr<Marks> marks = std::make_unique<NoMarks>());
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  [[nodiscard]] std::string_view backend() const { return progress_.backend_name(); }
  [[nodiscard]] std::uint64_t incarnation() const { return incarnation_; }

  [[nodiscard]] std::string describe() const { return progress_.describe(); }

  /// The memory must stay mapped until deregister_memory() or close().
  [[nodiscard]] RegisteredMemory register_memory(MemoryRange range, MemoryUse use = {});
  /// Fence: nothing lands in the region after it returns. Peers with writes half done out of it or
  /// into it are lost. Unknown ids, and any id after close(), are ignored.
  void deregister_memory(RegionId region);

  [[nodiscard]] CreatedEndpoint create_endpoint(const std::string& label);
  /// Both sides call it, at their own time; kConnected follows, or kPeerLost.
  void connect(PeerId peer, std::string_view descriptor, const std::vector<Bytes>& memory);

  /// A mark behind all that a device's stream was given by now, for write().
  [[nodiscard]] Mark mark(std::uintptr_t stream) { return marks_->mark(stream); }
  [[nodiscard]] bool reached(Mark mark) const { return marks_->reached(mark); }

  /// `imm` is a signal behind it, cheaper than a call of its own. The source is not read before
  /// `after` is reached; what follows to the same peer waits as well.
  [[nodiscard]] TransferId write(PeerId peer, std::span<const std::int64_t> local,
                                 std::span<const std::int64_t> remote,
                                 std::span<const std::int64_t> nbytes,
                                 std::optional<std::uint32_t> imm = {}, Mark after = 0);
  /// Those of these writes of which nothing is posted yet fail at once, without their signals; the
  /// others end as they would.
  void cancel(PeerId peer, std::vector<TransferId> ids);
  void signal(PeerId peer, std::uint32_t imm);
  void send(PeerId peer, Bytes message);

  /// The oldest events.
  [[nodiscard]] std::vector<Event> poll(std::size_t max_events);
  /// True as soon as an event is queued, false after `timeout` without one.
  [[nodiscard]] bool wait(std::chrono::duration<double> timeout);

  /// Fence: nothing of the peer lands after it returns. Its outstanding writes fail.
  void close_peer(PeerId peer);
  [[nodiscard]] Stats stats();
  [[nodiscard]] Stats peer_stats(PeerId peer);
  /// The way to a connected peer.
  [[nodiscard]] Path peer_path(PeerId peer);

  /// Says goodbye, fences every peer, joins the progress thread. Idempotent.
  void close();

 private:
  /// What API threads know of a peer.
  struct PeerEntry {
    std::string label;
    Token token{};
    bool connecting = false;  ///< connect() was called.
    std::shared_ptr<const RegionIndex> remote_regions = nullptr;
    std::string lost_reason = {};  ///< Not empty: lost.
  };

  template <class Function>
  auto ask(const char* call, Function function);
  void queue(EventLoop::Command command);  // mutex_ is held; run_queued() must follow
  void run_queued();
  PeerEntry& find_peer(PeerId peer, const char* call);
  PeerEntry& find_usable_peer(PeerId peer, const char* call);
  [[nodiscard]] EndpointDescriptor decode_endpoint(std::string_view bytes) const;
  [[nodiscard]] std::vector<RemoteMemory> decode_memory(const std::vector<Bytes>& memory,
                                                        std::uint64_t incarnation) const;

  const EngineConfig config_;
  const std::uint64_t incarnation_;
  const std::unique_ptr<Marks> marks_;
  const std::shared_ptr<SlicePool> slice_pool_ = std::make_shared<SlicePool>();
  EventQueue events_;

  std::mutex mutex_;  // guards all below but progress_
  bool closed_ = false;
  PeerId next_peer_ = 1;
  TransferId next_transfer_ = 1;
  RegionId next_region_ = 1;
  std::unordered_map<PeerId, PeerEntry> peers_;
  std::shared_ptr<const RegionIndex> local_regions_ = std::make_shared<RegionIndex>();

  Progress progress_;  // last: its thread uses what is above
};

}  // namespace rkv
