// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>

#include "core/types.h"

namespace rkv::verbs {

/// WRs posted with one doorbell; the last one is signalled and answers for all.
struct Chain {
  enum class Kind : std::uint8_t { kWrites, kSignal, kProbe };
  Kind kind = Kind::kWrites;
  TransferId transfer = 0;
  std::uint32_t slices = 0;  ///< Of that transfer.
  std::uint32_t wrs = 0;
  std::uint64_t nbytes = 0;
};

/// Exact account of one QP's send queue. A WR holds its slot until the signalled WR at the end of
/// its chain completes (RC completes in order; ibv_post_send(3)), so slots return chain by chain.
class SendQueue {
 public:
  explicit SendQueue(std::uint32_t capacity, std::uint32_t first_sequence = 0)
      : free_(capacity), first_(first_sequence) {}

  [[nodiscard]] std::uint32_t free_wrs() const { return free_; }
  [[nodiscard]] std::uint32_t outstanding_wrs() const { return outstanding_; }
  [[nodiscard]] std::uint64_t outstanding_bytes() const { return nbytes_; }
  [[nodiscard]] bool idle() const { return chains_.empty(); }
  /// Sequence number that push() will give to the next chain: the lower half of its wr_id.
  [[nodiscard]] std::uint32_t next_sequence() const {
    return first_ + static_cast<std::uint32_t>(chains_.size());
  }

  /// Takes the slots of a chain about to be posted; chain.wrs must not exceed free_wrs().
  void push(const Chain& chain);
  /// Gives back the slots of the oldest chain. @throw std::logic_error if it is another one: the
  /// account would be wrong from then on.
  Chain pop(std::uint32_t sequence);
  /// The chain that `sequence` names, or nullptr.
  [[nodiscard]] const Chain* find(std::uint32_t sequence) const;

 private:
  std::uint32_t free_;
  std::uint32_t outstanding_ = 0;
  std::uint64_t nbytes_ = 0;
  std::uint32_t first_;  // sequence of chains_.front(); wraps
  std::deque<Chain> chains_;
};

}  // namespace rkv::verbs
