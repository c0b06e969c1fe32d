// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/event_loop.h"
#include "core/regions.h"
#include "core/types.h"
#include "core/unique_fd.h"

namespace rkv {

/// What a backend tells the engine from progress().
struct Completion {
  enum class Kind : std::uint8_t {
    kWritesLanded,  ///< `slices` more slices of `transfer` are in the peer's memory.
    kImm,           ///< The peer's signal `imm`; all its earlier writes have landed here.
    kReachable,     ///< Every path to the peer has carried something since connect().
    kPeerError,     ///< The connection is broken or the peer broke the protocol: `reason`.
  };
  Kind kind = Kind::kWritesLanded;
  PeerId peer = 0;
  TransferId transfer = 0;
  std::size_t slices = 0;
  std::uint32_t imm = 0;
  std::string reason = {};
};

/// A region of a peer.
struct RemoteMemory {
  MemoryRange range;
  Bytes blob;  ///< The peer's register_memory().
};

/// Everything a backend needs to reach a peer.
struct PeerLink {
  Bytes blob;                        ///< The peer's create_endpoint().
  std::vector<RemoteMemory> memory;  ///< By remote region.
  std::vector<UniqueFd> sockets;     ///< Authenticated connections, see lanes().
};

/// Memory that the hardware may read, and peers may write where it was asked for. Destroying it
/// fences: nothing can land in it afterwards. Pinning and unpinning may take seconds.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  virtual ~PinnedMemory() = default;
};

/// The way to a peer.
struct Path {
  std::string backend = {};
  std::string description = {};  ///< "cuda_ipc: same GPU"; without `writes` the reason.
  std::string warning = {};      ///< Why it is slower than the hardware allows, and what to do.
  bool writes = true;            ///< Whether this side can write by it.
};

/// What became of post_writes().
struct Posted {
  std::size_t slices = 0;  ///< Accepted, from the first on.
  bool signalled = false;  ///< The signal is posted too.
};

/// Moves bytes: one-sided writes of many descriptors, then a signal. In verbs' nouns, so that a
/// verbs or libfabric backend maps onto it call by call.
///
/// Threads: every method but the constructor, the destructor, pin_memory(), small_write(),
/// describe() and cpus() is called in the engine's turns, one at a time, so a backend needs no
/// locks. None of those blocks. Liveness, messages and set-up of authenticated sockets are the
/// engine's; a backend only reports what its own connections tell it.
class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  [[nodiscard]] virtual std::string_view name() const = 0;

  /// TCP connections, authenticated by the engine, that this backend wants per peer (0: none).
  [[nodiscard]] virtual std::uint8_t lanes() const = 0;

  /// Slices per peer that may be posted and not yet landed, where the user set `queue_depth`.
  [[nodiscard]] virtual std::size_t window(std::size_t queue_depth) const { return queue_depth; }

  /// Called once, first. The backend watches its file descriptors on `loop`, which outlives it.
  virtual void attach(EventLoop& loop) = 0;

  /// What it uses and why, for people; a few lines without a final newline.
  [[nodiscard]] virtual std::string describe() const { return std::string(name()); }

  /// CPUs near its hardware, where the progress thread should run; empty: anywhere.
  [[nodiscard]] virtual std::vector<std::size_t> cpus() const { return {}; }

  /// Whether progress() finds data by itself; otherwise watched file descriptors bring it.
  [[nodiscard]] virtual bool polls() const { return false; }

  /// How long to poll after activity before sleeping, where the user did not say.
  [[nodiscard]] virtual std::chrono::microseconds default_spin() const { return {}; }

  /// Bytes of a write that its caller may post itself, where posting copies. Thread-safe.
  [[nodiscard]] virtual std::uint64_t small_write() const { return 64 << 10; }

  /// The slow half of registration. Thread-safe, on the caller's thread: the progress thread must
  /// go on answering heartbeats meanwhile. May be null. The caller owns the memory and keeps it
  /// mapped until the result is destroyed.
  /// @throw std::runtime_error with call, errno and remedy; std::invalid_argument for a kind of
  /// memory that it cannot reach.
  [[nodiscard]] virtual std::unique_ptr<PinnedMemory> pin_memory(const MemoryRange& /*range*/,
                                                                 const MemoryUse& /*use*/) {
    return nullptr;
  }

  /// The quick half. The result travels in the memory's descriptor; it is empty for memory that
  /// peers may not write.
  virtual Bytes register_memory(RegionId region, MemoryRange range, MemoryUse use,
                                std::unique_ptr<PinnedMemory> pinned) = 0;

  /// Fences the region once what it returns is destroyed. A peer whose write is half landed in it
  /// is reported as kPeerError.
  [[nodiscard]] virtual std::unique_ptr<PinnedMemory> deregister_memory(RegionId region) = 0;

  /// Local half of a connection. The result travels in the endpoint's descriptor.
  virtual Bytes create_endpoint(PeerId peer) = 0;

  /// Whether an endpoint with this blob can be connected to. Both sides come to one answer.
  [[nodiscard]] virtual bool accepts(std::string_view /*blob*/) const { return true; }

  /// Completes the connection. Afterwards the peer's writes may land, and posts are legal.
  /// @throw std::runtime_error or FormatError; the engine then reports the peer lost.
  virtual void connect(PeerId peer, PeerLink link) = 0;

  /// Sends something over every path to the peer that is idle, and reports kReachable the first
  /// time that all have answered. Called when the peer is ready, then at every heartbeat.
  virtual void probe(PeerId peer) = 0;

  /// Of a connected peer.
  [[nodiscard]] virtual Path path(PeerId /*peer*/) const {
    return {.backend = std::string(name()), .description = describe()};
  }

  /// Posts a prefix of `slices`: less than all means the queue is full, and the engine offers the
  /// rest again after completions. Never fails; errors arrive as kPeerError. The source bytes stay
  /// untouched until the slices are reported landed. `imm` is a signal that follows directly: the
  /// backend may post it along with the last slice, but need not.
  virtual Posted post_writes(PeerId peer, TransferId transfer, std::span<const WriteSlice> slices,
                             std::optional<std::uint32_t> imm) = 0;

  /// Posts a signal ordered behind every write posted to that peer before. False: queue full.
  virtual bool post_signal(PeerId peer, std::uint32_t imm) = 0;

  /// Abort and fence: after it returns nothing of that peer can land, no completion of it follows
  /// and its source bytes are free. Needs no help from the peer. Unknown peers are ignored.
  virtual void close_peer(PeerId peer) = 0;

  /// Sends what is posted and appends what completed. @return whether it did anything.
  virtual bool progress(std::vector<Completion>& completions) = 0;

  /// Called before the progress thread sleeps. @return whether it may: from then on every new
  /// completion makes a watched file descriptor readable.
  [[nodiscard]] virtual bool arm() { return true; }

  /// Adds this backend's counters.
  virtual void add_stats(Stats& stats) const = 0;
};

}  // namespace rkv
