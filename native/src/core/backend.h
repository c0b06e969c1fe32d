// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
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
    kPeerError,     ///< The connection is broken or the peer broke the protocol: `reason`.
  };
  Kind kind = Kind::kWritesLanded;
  PeerId peer = 0;
  TransferId transfer = 0;
  std::size_t slices = 0;
  std::uint32_t imm = 0;
  std::string reason = {};
};

/// Everything a backend needs to reach a peer.
struct PeerLink {
  Bytes blob;                     ///< The peer's create_endpoint().
  std::vector<Bytes> memory;      ///< The peer's register_memory(), by remote region.
  std::vector<UniqueFd> sockets;  ///< Authenticated connections, see lanes().
};

/// Moves bytes: one-sided writes of many descriptors, then a signal. In verbs' nouns, so that a
/// verbs or libfabric backend maps onto it call by call.
///
/// Threads: every method but the constructor and destructor runs on the engine's progress thread,
/// so a backend needs no locks. No method blocks. Liveness, messages and set-up of authenticated
/// sockets are the engine's; a backend only reports what its own connections tell it.
class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  [[nodiscard]] virtual std::string_view name() const = 0;

  /// TCP connections, authenticated by the engine, that this backend wants per peer (0: none).
  [[nodiscard]] virtual std::uint8_t lanes() const = 0;

  /// Called once, first. The backend watches its file descriptors on `loop`, which outlives it.
  virtual void attach(EventLoop& loop) = 0;

  /// Makes memory writable by peers. The result travels in the memory's descriptor (keys are 64
  /// bits wide everywhere). The caller owns the memory and keeps it mapped until deregistered.
  /// @throw std::runtime_error with call, errno and remedy.
  virtual Bytes register_memory(RegionId region, MemoryRange range) = 0;

  /// Fences: after it returns nothing can land in the region. A peer whose write is half landed
  /// in it is reported as kPeerError.
  virtual void deregister_memory(RegionId region) = 0;

  /// Local half of a connection. The result travels in the endpoint's descriptor.
  virtual Bytes create_endpoint(PeerId peer) = 0;

  /// Completes the connection. Afterwards the peer's writes may land, and posts are legal.
  /// @throw std::runtime_error or FormatError; the engine then reports the peer lost.
  virtual void connect(PeerId peer, PeerLink link) = 0;

  /// Posts a prefix of `slices` and returns its length: less than all means the queue is full,
  /// and the engine offers the rest again after completions. Never fails; errors arrive as
  /// kPeerError. The source bytes stay untouched until the slices are reported landed.
  virtual std::size_t post_writes(PeerId peer, TransferId transfer,
                                  std::span<const WriteSlice> slices) = 0;

  /// Posts a signal ordered behind every write posted to that peer before. False: queue full.
  virtual bool post_signal(PeerId peer, std::uint32_t imm) = 0;

  /// Abort and fence: after it returns nothing of that peer can land, no completion of it follows
  /// and its source bytes are free. Needs no help from the peer. Unknown peers are ignored.
  virtual void close_peer(PeerId peer) = 0;

  /// Sends what is posted and appends what completed. @return whether it did anything; on false
  /// the progress thread may sleep until a watched file descriptor wakes it.
  virtual bool progress(std::vector<Completion>& completions) = 0;

  /// Adds this backend's counters.
  virtual void add_stats(Stats& stats) const = 0;
};

}  // namespace rkv
