// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "core/event_loop.h"
#include "tcp/frame.h"

namespace rkv::tcp {

/// Counters of all lanes of a backend.
struct LaneStats {
  std::uint64_t frames_sent = 0;
  std::uint64_t frames_landed = 0;
  std::uint64_t bytes_received = 0;  ///< Payload only.
  std::uint64_t send_calls = 0;
  std::uint64_t send_blocked = 0;
  std::uint64_t receive_calls = 0;
};

/// A peer's signal, due once each lane has landed as many write frames as listed here.
struct Signal {
  std::uint32_t imm = 0;
  std::vector<std::uint64_t> after;
};

/// What one turn of receiving brought, besides bytes in registered memory.
struct Inbox {
  struct Acked {
    TransferId transfer;
    std::size_t slices;
  };
  std::vector<Acked> acked;
  std::vector<Signal> signals;
};

/// One data connection. Progress thread only.
///
/// send() and receive() are the data path (lane_datapath.cc). Both throw std::runtime_error or
/// FormatError when the connection is broken or the peer broke the protocol; the lane is then
/// good for nothing but destruction.
class Lane {
 public:
  using Handler = EventLoop::Handler;

  /// Takes the connected socket over. `keys` and `stats` outlive the lane.
  Lane(EventLoop& loop, UniqueFd fd, const KeyTable& keys, LaneStats& stats, Handler on_ready);
  /// Closes: nothing can land through this lane any more.
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  /// Nothing lands or leaves from now on; the socket stays open until destruction.
  void stop();

  void enqueue(OutFrame frame);
  [[nodiscard]] std::uint64_t queued_bytes() const { return queued_bytes_; }
  /// Write frames ever enqueued; what a signal has to wait for.
  [[nodiscard]] std::uint64_t write_frames() const { return write_frames_; }
  /// The peer's write frames that are in memory, last byte included.
  [[nodiscard]] std::uint64_t landed() const { return landed_; }
  /// Whether a half-received frame is still going to write into `range`.
  [[nodiscard]] bool is_landing_in(const MemoryRange& range) const;

  /// Sending is not blocked and there is something to send.
  [[nodiscard]] bool can_send() const { return !blocked_ && (ack_due_ || !queue_.empty()); }
  /// Sends until the socket is full or the turn is over.
  void send();
  /// The socket takes bytes again.
  void unblock();
  /// Receives until the socket is empty or the turn is over.
  void receive(Inbox& inbox);

 private:
  /// Header and table come in one read, with them a small batch's whole payload.
  static constexpr std::size_t kPrefetchBytes = 32 << 10;
  static_assert(kPrefetchBytes >= kMaxHeadBytes);

  void queue_ack();
  [[nodiscard]] std::size_t gather();
  void finish_sent(std::size_t nbytes);
  void block();

  [[nodiscard]] std::size_t read_some(std::size_t& wanted);
  bool parse_frame(Inbox& inbox);
  void begin_write(const FrameHeader& header, const std::byte* table);
  void drain_prefetch();
  void land();
  void take_ack(std::uint64_t landed_there, Inbox& inbox);

  EventLoop& loop_;
  UniqueFd fd_;
  const KeyTable& keys_;
  LaneStats& stats_;

  std::deque<OutFrame> queue_;
  std::deque<Inbox::Acked> unacked_;  // write frames on the wire, oldest first
  std::vector<iovec> gathered_;
  std::uint64_t queued_bytes_ = 0;
  std::uint64_t write_frames_ = 0;
  std::uint64_t acked_ = 0;
  bool blocked_ = false;

  std::unique_ptr<std::byte[]> prefetch_;
  std::size_t prefetch_begin_ = 0;
  std::size_t prefetch_end_ = 0;
  std::vector<iovec> destinations_;  // of the frame under way, then the prefetch buffer
  std::size_t next_destination_ = 0;
  std::uint64_t payload_left_ = 0;
  std::uint64_t landed_ = 0;
  bool ack_due_ = false;
};

}  // namespace rkv::tcp
