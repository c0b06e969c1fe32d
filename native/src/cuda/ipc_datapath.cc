// SPDX-License-Identifier: Apache-2.0
#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <exception>
#include <iterator>
#include <utility>

#include "cuda/ipc_backend.h"

namespace rkv::cuda {

Posted IpcBackend::post_writes(PeerId id, TransferId transfer, std::span<const WriteSlice> slices,
                               std::optional<std::uint32_t> /*imm*/) {
  Peer& peer = peers_.at(id);
  Posted posted;
  if (peer.failed) return posted;
  if (!peer.copier) {
    fail(id, peer, "its memory cannot be written: " + peer.reach.text);
    return posted;
  }
  slices = slices.first(std::min(slices.size(), peer.copier->room()));
  rows_.clear();
  for (const WriteSlice& slice : slices) {
    const RemoteRegion& region = peer.regions[slice.remote_region];
    rows_.push_back({.from = slice.local_address,
                     .to = slice.remote_address - region.remote_base + region.mapped.address,
                     .nbytes = slice.nbytes,
                     .region_gate = region.gate});
  }
  try {
    while (posted.slices < rows_.size()) {
      const Copier::Launched launched =
          peer.copier->launch(std::span(rows_).subspan(posted.slices));
      peer.pending.emplace_back(Launch{transfer, launched.rows, launched.mark});
      posted.slices += launched.rows;
      ++launches_;
    }
  } catch (const std::exception& error) {
    fail(id, peer, error.what());
  }
  rows_launched_ += posted.slices;
  return posted;
}

bool IpcBackend::post_signal(PeerId id, std::uint32_t imm) {
  Peer& peer = peers_.at(id);
  if (peer.failed) return false;
  peer.pending.emplace_back(imm);
  return true;
}

/// Reports copies that are done and sends the signals behind them.
bool IpcBackend::advance(PeerId id, Peer& peer) {
  bool moved = false;
  for (; !peer.pending.empty(); peer.pending.pop_front(), moved = true) {
    if (const auto* imm = std::get_if<std::uint32_t>(&peer.pending.front())) {
      // The lane carries no writes, so the signal waits for none of them.
      peer.lane->enqueue(tcp::encode_signal(*imm, std::array<std::uint64_t, 1>{0}));
      continue;
    }
    const Launch& launch = std::get<Launch>(peer.pending.front());
    if (!marks_.reached(launch.mark)) break;
    if (peer.copier->was_refused()) {
      fail(id, peer, "the peer closed the connection or deregistered the memory under a write");
      break;
    }
    peer.copier->retire(launch.rows);
    completions_.push_back({.kind = Completion::Kind::kWritesLanded,
                            .peer = id,
                            .transfer = launch.transfer,
                            .slices = launch.rows});
  }
  if (peer.lane->can_send()) {
    peer.lane->send();
    moved = true;
  }
  return moved;
}

bool IpcBackend::progress(std::vector<Completion>& completions) {
  bool moved = false;
  for (auto& [id, peer] : peers_) {
    if (!peer.connected || peer.failed) continue;
    try {
      moved = advance(id, peer) || moved;
    } catch (const std::exception& error) {
      fail(id, peer, error.what());
    }
  }
  moved = moved || !completions_.empty();
  std::move(completions_.begin(), completions_.end(), std::back_inserter(completions));
  completions_.clear();
  return moved;
}

/// No file descriptor tells of a copy's end.
bool IpcBackend::arm() {
  return completions_.empty() && std::all_of(peers_.begin(), peers_.end(), [](const auto& entry) {
           return entry.second.failed || entry.second.pending.empty();
         });
}

void IpcBackend::on_lane_ready(PeerId id, std::uint32_t epoll_events) {
  Peer& peer = peers_.at(id);
  try {
    if ((epoll_events & EPOLLOUT) != 0) peer.lane->unblock();
    if ((epoll_events & ~std::uint32_t{EPOLLOUT}) == 0) return;
    inbox_.signals.clear();
    peer.lane->receive(inbox_);
    for (const tcp::Signal& signal : inbox_.signals) {
      completions_.push_back({.kind = Completion::Kind::kImm, .peer = id, .imm = signal.imm});
    }
  } catch (const std::exception& error) {
    fail(id, peer, error.what());
  }
}

}  // namespace rkv::cuda
