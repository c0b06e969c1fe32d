// SPDX-License-Identifier: Apache-2.0
#include "verbs/send_queue.h"

#include <stdexcept>

namespace rkv::verbs {

void SendQueue::push(const Chain& chain) {
  if (chain.wrs == 0 || chain.wrs > free_) throw std::logic_error("SendQueue: no room for a chain");
  free_ -= chain.wrs;
  outstanding_ += chain.wrs;
  nbytes_ += chain.nbytes;
  chains_.push_back(chain);
}

Chain SendQueue::pop(std::uint32_t sequence) {
  if (chains_.empty() || sequence != first_) {
    throw std::logic_error("SendQueue: completions out of order");
  }
  const Chain chain = chains_.front();
  chains_.pop_front();
  ++first_;
  free_ += chain.wrs;
  outstanding_ -= chain.wrs;
  nbytes_ -= chain.nbytes;
  return chain;
}

const Chain* SendQueue::find(std::uint32_t sequence) const {
  const std::uint32_t position = sequence - first_;  // wraps with the sequence
  return position < chains_.size() ? &chains_[position] : nullptr;
}

}  // namespace rkv::verbs
