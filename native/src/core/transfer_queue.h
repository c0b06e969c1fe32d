// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <unordered_map>
#include <variant>
#include <vector>

#include "core/backend.h"
#include "core/config.h"
#include "core/marks.h"
#include "core/slice_pool.h"
#include "core/types.h"

namespace rkv {

/// One write(): its slices and how far they are.
struct Transfer {
  TransferId id = 0;
  Slices slices = nullptr;
  std::optional<std::uint32_t> imm = {};  ///< Signal behind the last slice.
  Mark after = 0;                         ///< The source bytes are final once it is reached.
  std::size_t posted = 0;
  Clock::time_point posted_at = {};  ///< When the call began that posted the last slice.
  std::size_t landed = 0;
};

/// The writes and signals of one peer, in order, and the window over them: at most `queue_depth`
/// slices are posted and not yet landed, the rest waits here. Back-pressure is never a failure.
/// Progress thread only.
class TransferQueue {
 public:
  /// `marks` outlives the queue.
  TransferQueue(PeerId peer, std::size_t queue_depth, const Marks& marks)
      : peer_(peer), queue_depth_(queue_depth), marks_(marks) {}

  /// Each id once; `slices` must not be empty. `imm` is a signal to follow.
  void add_write(TransferId id, Slices slices, std::optional<std::uint32_t> imm = {},
                 Mark after = 0);
  void add_signal(std::uint32_t imm);

  /// Posts what the window and the backend take. @return whether anything was posted.
  bool post(Backend& backend);

  /// Accounts for `slices` more landed slices. @return the transfer if that completes it.
  std::shared_ptr<const Transfer> landed(TransferId id, std::size_t slices);

  /// Forgets a write of which nothing is posted, and its signal. @return whether it was one.
  bool drop(TransferId id);

  /// Forgets everything. @return the transfers that did not complete, oldest first.
  [[nodiscard]] std::vector<TransferId> abandon();

  /// Whether the next write waits for a mark, of which no completion will tell.
  [[nodiscard]] bool waits_for_mark() const;
  /// Whether everything is posted.
  [[nodiscard]] bool empty() const { return queue_.empty(); }
  [[nodiscard]] bool reads_from(RegionId region) const;
  [[nodiscard]] std::size_t in_flight() const { return in_flight_; }
  [[nodiscard]] std::size_t outstanding() const { return outstanding_.size(); }
  [[nodiscard]] std::uint64_t slices_posted() const { return slices_posted_; }

 private:
  using Work = std::variant<std::shared_ptr<Transfer>, std::uint32_t>;

  bool post_front(Backend& backend);
  bool post_slices(Backend& backend, Transfer& transfer);

  PeerId peer_;
  std::size_t queue_depth_;
  const Marks& marks_;
  std::deque<Work> queue_;  // not yet posted completely
  std::unordered_map<TransferId, std::shared_ptr<Transfer>> outstanding_;
  std::size_t in_flight_ = 0;
  std::uint64_t slices_posted_ = 0;
};

}  // namespace rkv
