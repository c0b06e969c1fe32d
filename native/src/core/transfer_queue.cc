// SPDX-License-Identifier: Apache-2.0
#include "core/transfer_queue.h"

#include <algorithm>
#include <span>
#include <utility>

namespace rkv {

void TransferQueue::add_write(TransferId id, Slices slices, std::optional<std::uint32_t> imm,
                              Mark after) {
  auto transfer = std::make_shared<Transfer>();
  transfer->id = id;
  transfer->slices = std::move(slices);
  transfer->imm = imm;
  transfer->after = after;
  outstanding_[id] = transfer;
  queue_.emplace_back(std::move(transfer));
}

void TransferQueue::add_signal(std::uint32_t imm) { queue_.emplace_back(imm); }

bool TransferQueue::post(Backend& backend) {
  const std::uint64_t slices_before = slices_posted_;
  const std::size_t work_before = queue_.size();
  while (!queue_.empty() && post_front(backend)) queue_.pop_front();
  return slices_posted_ != slices_before || queue_.size() != work_before;
}

/// @return whether the front is posted completely.
bool TransferQueue::post_front(Backend& backend) {
  if (const auto* imm = std::get_if<std::uint32_t>(&queue_.front())) {
    return backend.post_signal(peer_, *imm);
  }
  // A copy: the queue's front becomes the signal that could not go along with the last slice.
  const std::shared_ptr<Transfer> transfer = std::get<std::shared_ptr<Transfer>>(queue_.front());
  if (!post_slices(backend, *transfer)) return false;
  if (!transfer->imm) return true;
  queue_.front() = *transfer->imm;
  return post_front(backend);
}

/// @return whether all slices are posted.
bool TransferQueue::post_slices(Backend& backend, Transfer& transfer) {
  if (!marks_.reached(transfer.after)) return false;
  const std::size_t room = queue_depth_ - in_flight_;
  const std::size_t left = transfer.slices->size() - transfer.posted;
  const std::size_t offered = std::min(room, left);
  if (offered == 0) return false;
  transfer.posted_at = Clock::now();
  const Posted posted = backend.post_writes(
      peer_, transfer.id, std::span(*transfer.slices).subspan(transfer.posted, offered),
      offered == left ? transfer.imm : std::nullopt);
  if (posted.signalled) transfer.imm.reset();
  transfer.posted += posted.slices;
  in_flight_ += posted.slices;
  slices_posted_ += posted.slices;
  return transfer.posted == transfer.slices->size();
}

std::shared_ptr<const Transfer> TransferQueue::landed(TransferId id, std::size_t slices) {
  in_flight_ -= slices;
  const auto found = outstanding_.find(id);
  const std::shared_ptr<Transfer> transfer = found->second;
  transfer->landed += slices;
  if (transfer->landed < transfer->slices->size()) return nullptr;
  outstanding_.erase(found);
  return transfer;
}

bool TransferQueue::drop(TransferId id) {
  const auto found = outstanding_.find(id);
  if (found == outstanding_.end() || found->second->posted > 0) return false;
  std::erase_if(queue_, [&](const Work& work) {
    const auto* transfer = std::get_if<std::shared_ptr<Transfer>>(&work);
    return transfer != nullptr && *transfer == found->second;
  });
  outstanding_.erase(found);
  return true;
}

std::vector<TransferId> TransferQueue::abandon() {
  std::vector<TransferId> ids;
  ids.reserve(outstanding_.size());
  for (const auto& [id, transfer] : outstanding_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  outstanding_.clear();
  queue_.clear();
  in_flight_ = 0;
  return ids;
}

bool TransferQueue::waits_for_mark() const {
  if (queue_.empty()) return false;
  const auto* transfer = std::get_if<std::shared_ptr<Transfer>>(&queue_.front());
  return transfer != nullptr && !marks_.reached((*transfer)->after);
}

bool TransferQueue::reads_from(RegionId region) const {
  return std::any_of(outstanding_.begin(), outstanding_.end(), [region](const auto& entry) {
    const auto& slices = *entry.second->slices;
    return std::any_of(slices.begin(), slices.end(),
                       [region](const WriteSlice& slice) { return slice.local_region == region; });
  });
}

}  // namespace rkv
