// SPDX-License-Identifier: Apache-2.0
#include <sys/epoll.h>

#include <algorithm>
#include <exception>
#include <iterator>

#include "core/error.h"
#include "tcp/tcp_backend.h"

namespace rkv::tcp {

Posted TcpBackend::post_writes(PeerId id, TransferId transfer, std::span<const WriteSlice> slices,
                               std::optional<std::uint32_t> /*imm*/) {
  Peer& peer = peers_.at(id);
  if (peer.failed) return {};
  std::uint64_t total = 0;
  for (const WriteSlice& slice : slices) total += slice.nbytes;
  const std::uint64_t share =
      std::clamp(total / peer.lanes.size(), kMinSplitBytes, kTargetFrameBytes);
  for (auto rest = slices; !rest.empty();) {
    const std::size_t n = frame_extent(rest, share);
    const auto& lane = *std::min_element(
        peer.lanes.begin(), peer.lanes.end(),
        [](const auto& a, const auto& b) { return a->queued_bytes() < b->queued_bytes(); });
    lane->enqueue(encode_write(transfer, rest.first(n), peer.keys));
    rest = rest.subspan(n);
  }
  return {.slices = slices.size()};
}

bool TcpBackend::post_signal(PeerId id, std::uint32_t imm) {
  Peer& peer = peers_.at(id);
  if (peer.failed) return false;
  std::vector<std::uint64_t> sent_by_lane;
  for (const auto& lane : peer.lanes) sent_by_lane.push_back(lane->write_frames());
  // Always the first lane, which keeps signals in order among themselves.
  peer.lanes.front()->enqueue(encode_signal(imm, sent_by_lane));
  return true;
}

void TcpBackend::on_lane_ready(PeerId id, std::size_t index, std::uint32_t epoll_events) {
  Peer& peer = peers_.at(id);
  Lane& lane = *peer.lanes[index];
  try {
    if ((epoll_events & EPOLLOUT) != 0) lane.unblock();
    if ((epoll_events & ~std::uint32_t{EPOLLOUT}) != 0) receive(id, peer, lane);
  } catch (const std::exception& error) {
    fail(id, error.what());
  }
}

void TcpBackend::receive(PeerId id, Peer& peer, Lane& lane) {
  inbox_.acked.clear();
  inbox_.signals.clear();
  lane.receive(inbox_);
  for (const Inbox::Acked& acked : inbox_.acked) {
    completions_.push_back({.kind = Completion::Kind::kWritesLanded,
                            .peer = id,
                            .transfer = acked.transfer,
                            .slices = acked.slices});
  }
  for (Signal& signal : inbox_.signals) {
    if (signal.after.size() != peer.lanes.size()) throw FormatError("signal for other lanes");
    peer.signals.push_back(std::move(signal));
  }
  deliver_signals(id, peer);
}

void TcpBackend::deliver_signals(PeerId id, Peer& peer) {
  while (!peer.signals.empty()) {
    const Signal& signal = peer.signals.front();
    for (std::size_t i = 0; i < peer.lanes.size(); ++i) {
      if (peer.lanes[i]->landed() < signal.after[i]) return;
    }
    completions_.push_back({.kind = Completion::Kind::kImm, .peer = id, .imm = signal.imm});
    peer.signals.pop_front();
  }
}

bool TcpBackend::progress(std::vector<Completion>& completions) {
  bool moved = false;
  for (auto& [id, peer] : peers_) {
    if (peer.failed) continue;
    try {
      for (const auto& lane : peer.lanes) {
        if (!lane->can_send()) continue;
        lane->send();
        moved = true;
      }
    } catch (const std::exception& error) {
      fail(id, error.what());
    }
  }
  moved = moved || !completions_.empty();
  std::move(completions_.begin(), completions_.end(), std::back_inserter(completions));
  completions_.clear();
  return moved;
}

}  // namespace rkv::tcp
