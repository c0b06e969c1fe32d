// SPDX-License-Identifier: Apache-2.0
#include "paced/paced_backend.h"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "core/error.h"

namespace rkv::paced {
namespace {

/// Slices are reported one by one or, if they are smaller, in groups of this size: it is 2.6 us of
/// a 200 Gb/s link, and the engine refills its window as often.
constexpr std::uint64_t kGroupBytes = 64 << 10;
/// The thread polls for what is due within this and sleeps for longer waits, of which it polls the
/// last part: a timer is 50 to 100 us late.
constexpr std::chrono::microseconds kPoll{1000};
constexpr std::chrono::microseconds kWakeEarly{500};

}  // namespace

PacedBackend::PacedBackend(std::unique_ptr<Backend> inner, Link link, Now now)
    : inner_(std::move(inner)),
      link_(std::move(link)),
      now_(now),
      // steady_clock is CLOCK_MONOTONIC.
      timer_(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)) {
  if (!timer_) throw_errno("timerfd_create", errno, "raise `ulimit -n`");
}

PacedBackend::~PacedBackend() {
  if (loop_ != nullptr) loop_->unwatch(timer_.get());
}

void PacedBackend::attach(EventLoop& loop) {
  inner_->attach(loop);
  loop.watch(timer_.get(), EPOLLIN, [this](std::uint32_t /*events*/) {
    std::uint64_t expirations = 0;
    (void)!read(timer_.get(), &expirations, sizeof expirations);
    wakes_for_.reset();
    asleep_ = false;
  });
  loop_ = &loop;
}

std::string PacedBackend::describe() const {
  return "paced link " + link_.text + ": " + inner_->describe();
}

Path PacedBackend::path(PeerId peer) const {
  Path path = inner_->path(peer);
  path.description = "paced link " + link_.text + ": " + path.description;
  return path;
}

Posted PacedBackend::post_writes(PeerId peer, TransferId transfer,
                                 std::span<const WriteSlice> slices,
                                 std::optional<std::uint32_t> /*imm*/) {
  // The signal is never the inner backend's: it would be there before the link has carried it.
  const std::size_t n = inner_->post_writes(peer, transfer, slices, {}).slices;
  if (n > 0) hold(lanes_[peer], transfer, slices.first(n));
  return {.slices = n};
}

void PacedBackend::hold(Lane& lane, TransferId transfer, std::span<const WriteSlice> slices) {
  const Clock::time_point start = std::max(now_(), lane.free);
  std::uint64_t nbytes = 0;
  // From the sum: rounding each slice of 512 B to nanoseconds would change the rate.
  const auto sent = [&] {
    return start + std::chrono::round<Clock::duration>(std::chrono::duration<double>(
                       static_cast<double>(nbytes) / link_.bytes_per_s));
  };
  Held group{.transfer = transfer};
  std::uint64_t group_bytes = 0;
  for (const WriteSlice& slice : slices) {
    nbytes += slice.nbytes;
    group_bytes += slice.nbytes;
    ++group.slices;
    if (group_bytes < kGroupBytes && &slice != &slices.back()) continue;
    group.due = sent() + link_.latency;
    lane.held.push_back(group);
    group.slices = 0;
    group_bytes = 0;
  }
  lane.free = sent();
}

bool PacedBackend::post_signal(PeerId peer, std::uint32_t imm) {
  Lane& lane = lanes_[peer];
  lane.free = std::max(now_(), lane.free);
  lane.held.push_back({.due = lane.free + link_.latency, .imm = imm});
  return true;
}

void PacedBackend::close_peer(PeerId peer) {
  inner_->close_peer(peer);
  lanes_.erase(peer);
}

bool PacedBackend::progress(std::vector<Completion>& completions) {
  bool moved = inner_->progress(reported_);
  for (Completion& done : reported_) {
    if (done.kind == Completion::Kind::kWritesLanded) {
      lanes_[done.peer].landed[done.transfer] += done.slices;
    } else {
      completions.push_back(std::move(done));
    }
  }
  reported_.clear();
  for (auto& [peer, lane] : lanes_) {
    if (!lane.held.empty()) moved |= release(peer, lane, now_(), completions);
  }
  // A caller's turn may have changed what is due next.
  if (asleep_) {
    if (const auto due = next_due()) wake_for(*due);
  }
  return moved;
}

/// Reports what is due and there, and posts the signals behind it. @return whether anything was.
bool PacedBackend::release(PeerId peer, Lane& lane, Clock::time_point now,
                           std::vector<Completion>& completions) {
  bool any = false;
  lane.late = false;
  for (; !lane.held.empty() && lane.held.front().due <= now; lane.held.pop_front()) {
    const Held& front = lane.held.front();
    const bool done =
        front.slices == 0 ? inner_->post_signal(peer, front.imm) : lane.take_landed(front);
    if (!done) {
      lane.late = true;
      break;
    }
    any = true;
    if (front.slices == 0) continue;
    completions.push_back({.kind = Completion::Kind::kWritesLanded,
                           .peer = peer,
                           .transfer = front.transfer,
                           .slices = front.slices});
  }
  return any;
}

bool PacedBackend::Lane::take_landed(const Held& group) {
  const auto found = landed.find(group.transfer);
  if (found == landed.end() || found->second < group.slices) return false;
  found->second -= group.slices;
  if (found->second == 0) landed.erase(found);
  return true;
}

/// Of what waits for the link; what is late waits for the inner backend, which will say so.
std::optional<Clock::time_point> PacedBackend::next_due() const {
  std::optional<Clock::time_point> next;
  for (const auto& [peer, lane] : lanes_) {
    if (lane.held.empty() || lane.late) continue;
    next = std::min(next.value_or(Clock::time_point::max()), lane.held.front().due);
  }
  return next;
}

void PacedBackend::wake_for(Clock::time_point due) {
  if (wakes_for_ == due) return;
  wakes_for_ = due;
  const std::int64_t at = nanoseconds(due - kWakeEarly);
  itimerspec spec{};
  spec.it_value.tv_sec = at / 1'000'000'000;
  spec.it_value.tv_nsec = at % 1'000'000'000;
  if (timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &spec, nullptr) != 0) {
    throw_errno("timerfd_settime", errno);
  }
}

bool PacedBackend::arm() {
  asleep_ = false;
  const auto due = next_due();
  if (due && *due <= now_() + kPoll) return false;
  if (!inner_->arm()) return false;
  if (due) wake_for(*due);
  asleep_ = true;
  return true;
}

}  // namespace rkv::paced
