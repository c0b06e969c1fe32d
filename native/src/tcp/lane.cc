// SPDX-License-Identifier: Apache-2.0
/// Set-up and tear-down of a lane; sending and receiving are in lane_datapath.cc.
#include "tcp/lane.h"

#include <sys/epoll.h>

#include <algorithm>
#include <utility>

namespace rkv::tcp {

Lane::Lane(EventLoop& loop, UniqueFd fd, const KeyTable& keys, LaneStats& stats, Handler on_ready)
    : loop_(loop),
      fd_(std::move(fd)),
      keys_(keys),
      stats_(stats),
      prefetch_(std::make_unique<std::byte[]>(kPrefetchBytes)) {
  loop_.watch(fd_.get(), EPOLLIN, std::move(on_ready));
}

Lane::~Lane() { stop(); }

void Lane::stop() { loop_.unwatch(fd_.get()); }

void Lane::enqueue(OutFrame frame) {
  queued_bytes_ += frame.nbytes;
  if (frame.slices > 0) ++write_frames_;
  queue_.push_back(std::move(frame));
}

bool Lane::is_landing_in(const MemoryRange& range) const {
  if (payload_left_ == 0) return false;
  return std::any_of(
      destinations_.begin() + static_cast<std::ptrdiff_t>(next_destination_),
      destinations_.end() - 1, [&](const iovec& iov) {
        return range.overlaps({reinterpret_cast<std::uint64_t>(iov.iov_base), iov.iov_len});
      });
}

void Lane::block() {
  ++stats_.send_blocked;
  blocked_ = true;
  loop_.change(fd_.get(), EPOLLIN | EPOLLOUT);
}

void Lane::unblock() {
  blocked_ = false;
  loop_.change(fd_.get(), EPOLLIN);
}

}  // namespace rkv::tcp
