// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/socket.h"
#include "tcp/lane.h"

namespace rkv::tcp {
namespace {

/// Bytes moved per lane and turn, so that one fast peer does not starve the rest.
constexpr std::size_t kTurnBytes = 4 << 20;
/// Entries per sendmsg (IOV_MAX is 1024; the kernel copies the array on every call).
constexpr std::size_t kSendEntries = 512;

}  // namespace

void Lane::send() {
  std::size_t turn = 0;
  while (can_send() && turn < kTurnBytes) {
    if (ack_due_) queue_ack();
    const std::size_t wanted = gather();
    const IoResult sent = send_some(fd_.get(), gathered_.data(), gathered_.size());
    ++stats_.send_calls;
    if (sent.status == IoStatus::kClosed) {
      throw std::runtime_error("data lane: " + sent.reason("sendmsg"));
    }
    finish_sent(sent.nbytes);
    turn += sent.nbytes;
    if (sent.nbytes < wanted) block();
  }
}

void Lane::queue_ack() {
  ack_due_ = false;
  // Ahead of everything that has not begun: the peer's window waits for it.
  const bool begun = !queue_.empty() && queue_.front().begun;
  OutFrame ack = encode_ack(landed_);
  queued_bytes_ += ack.nbytes;
  queue_.insert(queue_.begin() + (begun ? 1 : 0), std::move(ack));
}

std::size_t Lane::gather() {
  gathered_.clear();
  std::size_t nbytes = 0;
  for (const OutFrame& frame : queue_) {
    const std::size_t room = kSendEntries - gathered_.size();
    const std::size_t taken = std::min(room, frame.iov.size() - frame.next);
    for (std::size_t i = frame.next; i < frame.next + taken; ++i) {
      gathered_.push_back(frame.iov[i]);
      nbytes += frame.iov[i].iov_len;
    }
    if (gathered_.size() == kSendEntries || nbytes >= kTurnBytes) break;
  }
  return nbytes;
}

void Lane::finish_sent(std::size_t nbytes) {
  queued_bytes_ -= nbytes;
  while (nbytes > 0) {
    OutFrame& frame = queue_.front();
    const std::size_t taken = std::min(nbytes, frame.nbytes);
    frame.begun = true;
    frame.nbytes -= taken;
    nbytes -= taken;
    if (frame.nbytes > 0) {
      advance(frame.iov, frame.next, taken);
      return;
    }
    if (frame.slices > 0) unacked_.push_back({frame.transfer, frame.slices});
    ++stats_.frames_sent;
    queue_.pop_front();
  }
}

void Lane::receive(Inbox& inbox) {
  std::size_t turn = 0;
  while (turn < kTurnBytes) {
    std::size_t wanted = 0;
    const std::size_t got = read_some(wanted);
    while (parse_frame(inbox)) {
    }
    turn += got;
    // A short read emptied the socket; epoll tells when there is more.
    if (got < wanted) return;
  }
}

std::size_t Lane::read_some(std::size_t& wanted) {
  IoResult got;
  if (payload_left_ > 0) {
    // Straight into the destinations; what follows them is the next frame's head.
    wanted = payload_left_ + kPrefetchBytes;
    got = receive_some(fd_.get(), destinations_.data() + next_destination_,
                       destinations_.size() - next_destination_);
  } else {
    std::memmove(prefetch_.get(), prefetch_.get() + prefetch_begin_,
                 prefetch_end_ - prefetch_begin_);
    prefetch_end_ -= prefetch_begin_;
    prefetch_begin_ = 0;
    wanted = kPrefetchBytes - prefetch_end_;
    got = receive_some(fd_.get(), prefetch_.get() + prefetch_end_, wanted);
  }
  ++stats_.receive_calls;
  if (got.status == IoStatus::kClosed) {
    throw std::runtime_error("data lane: " + got.reason("readv"));
  }
  if (payload_left_ == 0) {
    prefetch_end_ += got.nbytes;
    return got.nbytes;
  }
  const std::size_t payload = std::min(got.nbytes, payload_left_);
  advance(destinations_, next_destination_, payload);
  payload_left_ -= payload;
  prefetch_end_ = got.nbytes - payload;
  if (payload_left_ == 0) land();
  return got.nbytes;
}

/// @return whether a whole frame head was there to parse.
bool Lane::parse_frame(Inbox& inbox) {
  if (payload_left_ > 0 || prefetch_end_ - prefetch_begin_ < sizeof(FrameHeader)) return false;
  FrameHeader header;
  std::memcpy(&header, prefetch_.get() + prefetch_begin_, sizeof header);
  check_header(header);
  const std::size_t head = sizeof header + table_bytes(header);
  if (prefetch_end_ - prefetch_begin_ < head) return false;
  const std::byte* table = prefetch_.get() + prefetch_begin_ + sizeof header;
  prefetch_begin_ += head;
  switch (header.type) {
    case FrameType::kWrite:
      begin_write(header, table);
      break;
    case FrameType::kSignal: {
      Signal signal{static_cast<std::uint32_t>(header.value),
                    std::vector<std::uint64_t>(header.count)};
      std::memcpy(signal.after.data(), table, table_bytes(header));
      inbox.signals.push_back(std::move(signal));
      break;
    }
    case FrameType::kAck:
      take_ack(header.value, inbox);
      break;
  }
  return true;
}

void Lane::begin_write(const FrameHeader& header, const std::byte* table) {
  resolve_table(header, table, keys_, destinations_);
  destinations_.push_back({prefetch_.get(), kPrefetchBytes});
  next_destination_ = 0;
  payload_left_ = header.value;
  stats_.bytes_received += header.value;
  drain_prefetch();
  if (payload_left_ == 0) land();
}

/// Copies the payload bytes that came with the head, so that the rest goes straight to its place.
void Lane::drain_prefetch() {
  while (payload_left_ > 0 && prefetch_begin_ < prefetch_end_) {
    const iovec& target = destinations_[next_destination_];
    const std::size_t n = std::min(target.iov_len, prefetch_end_ - prefetch_begin_);
    std::memcpy(target.iov_base, prefetch_.get() + prefetch_begin_, n);
    advance(destinations_, next_destination_, n);
    prefetch_begin_ += n;
    payload_left_ -= n;
  }
  if (prefetch_begin_ == prefetch_end_) prefetch_begin_ = prefetch_end_ = 0;
}

void Lane::land() {
  ++landed_;
  ++stats_.frames_landed;
  ack_due_ = true;
}

void Lane::take_ack(std::uint64_t landed_there, Inbox& inbox) {
  if (landed_there < acked_ || landed_there - acked_ > unacked_.size()) {
    throw FormatError("acknowledgement of " + std::to_string(landed_there) + " frames; between " +
                      std::to_string(acked_) + " and " + std::to_string(acked_ + unacked_.size()) +
                      " are possible");
  }
  for (; acked_ < landed_there; ++acked_) {
    inbox.acked.push_back(unacked_.front());
    unacked_.pop_front();
  }
}

}  // namespace rkv::tcp
