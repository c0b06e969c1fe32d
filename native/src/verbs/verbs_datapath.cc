// SPDX-License-Identifier: Apache-2.0
/// The data path of the verbs backend: posting, polling, signals.
#include <arpa/inet.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <stdexcept>

#include "cuda/visibility.h"
#include "verbs/failure.h"
#include "verbs/verbs_backend.h"

namespace rkv::verbs {
namespace {

/// A chain carries up to this much before the next one goes to another QP: small enough that two
/// rails share a transfer evenly, large enough that doorbells and CQEs cost nothing beside it.
constexpr std::uint64_t kMaxChainBytes = 512 << 10;
constexpr std::uint64_t kMinChainBytes = 64 << 10;
constexpr std::size_t kPollBatch = 32;               ///< CQEs taken with one call.
constexpr int kMaxPollRounds = 16;                   ///< Batches before posting gets its turn.
constexpr std::size_t kMaxEarlySignals = kSrqDepth;  ///< More than a peer can have in flight.

std::uint64_t chain_bytes(std::span<const WriteSlice> slices, std::size_t channels) {
  std::uint64_t total = 0;
  for (const WriteSlice& slice : slices) total += slice.nbytes;
  return std::clamp(total / channels, kMinChainBytes, kMaxChainBytes);
}

std::uint64_t make_wr_id(std::uint32_t serial, std::uint32_t sequence) {
  return std::uint64_t{serial} << 32 | sequence;
}

}  // namespace

Posted VerbsBackend::post_writes(PeerId id, TransferId transfer, std::span<const WriteSlice> slices,
                                 std::optional<std::uint32_t> imm) {
  Peer& peer = peers_.at(id);
  const std::uint64_t share = chain_bytes(slices, peer.channels.size());
  Posted posted;
  while (posted.slices < slices.size() && !peer.failed) {
    Channel* channel = next_channel(peer);
    if (channel == nullptr) {
      ++counters_.posts_refused;
      break;
    }
    const auto rest = slices.subspan(posted.slices);
    const std::size_t n = builder_.build(rest, local_keys_[channel->rail], *channel->remote_keys,
                                         limits_of(*channel, share));
    posted.signalled = imm && n == rest.size() && suffices_for_signal(peer, *channel);
    const Chain chain{.kind = Chain::Kind::kWrites,
                      .transfer = transfer,
                      .slices = static_cast<std::uint32_t>(n),
                      .wrs = builder_.wrs(),
                      .nbytes = builder_.nbytes()};
    ibv_send_wr* wrs = builder_.finish(make_wr_id(channel->serial, channel->queue.next_sequence()),
                                       posted.signalled ? imm : std::nullopt);
    counters_.sges += builder_.sges();
    channel->dirty = true;
    post(*channel, chain, wrs);
    posted.slices += n;
  }
  return posted;
}

/// The least loaded channel with room for a slice, or nullptr.
VerbsBackend::Channel* VerbsBackend::next_channel(Peer& peer) const {
  Channel* best = nullptr;
  for (const auto& channel : peer.channels) {
    if (channel->queue.free_wrs() < kMaxWrsPerSlice) continue;
    if (rails_[channel->rail]->free_cqes() < kMaxWrsPerSlice) continue;
    if (best == nullptr || channel->queue.outstanding_bytes() < best->queue.outstanding_bytes()) {
      best = channel.get();
    }
  }
  return best;
}

ChainLimits VerbsBackend::limits_of(const Channel& channel, std::uint64_t nbytes) const {
  return {
      .wrs = std::min({kMaxChainWrs, channel.queue.free_wrs(), rails_[channel.rail]->free_cqes()}),
      .nbytes = nbytes,
      .wr_bytes = block_size_,
      .sges = channel.qp.max_sge(),
      .inline_bytes = channel.qp.max_inline_bytes()};
}

/// Whether a signal on `channel` alone comes after every earlier write and signal. What the peer's
/// NIC has acknowledged is ahead of its next CQE on the way to memory; of another NIC there that
/// cannot be said, so that one has to signal too.
bool VerbsBackend::suffices_for_signal(const Peer& peer, const Channel& channel) {
  return std::all_of(peer.channels.begin(), peer.channels.end(), [&](const auto& other) {
    return other.get() == &channel ||
           (other->queue.idle() && (other->remote_rail == channel.remote_rail || !other->dirty));
  });
}

void VerbsBackend::post(Channel& channel, const Chain& chain, ibv_send_wr* wrs) {
  if (channel.queue.idle()) channel.last_progress = Clock::now();
  // Accounted first: after a failure part of the chain may be in the queue.
  channel.queue.push(chain);
  rails_[channel.rail]->take_cqes(chain.wrs);
  rail_states_[channel.rail].bytes_posted += chain.nbytes;
  counters_.wrs += chain.wrs;
  ++counters_.doorbells;
  try {
    channel.qp.post(wrs);
  } catch (const std::runtime_error& error) {
    fail(channel.peer, error.what());
  }
}

void VerbsBackend::post_empty(Channel& channel, Chain::Kind kind, ibv_wr_opcode opcode,
                              std::uint32_t imm) {
  ibv_send_wr wr{};
  wr.wr_id = make_wr_id(channel.serial, channel.queue.next_sequence());
  wr.opcode = opcode;
  wr.send_flags = IBV_SEND_SIGNALED;
  wr.imm_data = htonl(imm);
  post(channel, {.kind = kind, .wrs = 1}, &wr);
}

bool VerbsBackend::post_signal(PeerId id, std::uint32_t imm) {
  Peer& peer = peers_.at(id);
  if (peer.failed) return false;
  for (const auto& channel : peer.channels) {
    if (suffices_for_signal(peer, *channel)) {
      if (!has_room(*channel, 1)) return false;
      channel->dirty = true;
      post_empty(*channel, Chain::Kind::kSignal, IBV_WR_RDMA_WRITE_WITH_IMM, imm);
      return true;
    }
  }
  // They may share a rail, and so a CQ.
  const auto n = static_cast<std::uint32_t>(peer.channels.size());
  const bool room = std::all_of(peer.channels.begin(), peer.channels.end(),
                                [&](const auto& channel) { return has_room(*channel, n); });
  if (!room) return false;
  for (const auto& channel : peer.channels) {
    channel->dirty = false;
    post_empty(*channel, Chain::Kind::kSignal, IBV_WR_SEND_WITH_IMM, imm);
  }
  return true;
}

/// For one WR, and for `wrs` on the rail.
bool VerbsBackend::has_room(const Channel& channel, std::uint32_t wrs) const {
  return channel.queue.free_wrs() > 0 && rails_[channel.rail]->free_cqes() >= wrs;
}

void VerbsBackend::probe(PeerId id) {
  Peer& peer = peers_.at(id);
  const Clock::time_point now = Clock::now();
  for (const auto& channel : peer.channels) {
    if (peer.failed) return;
    if (channel->queue.idle()) {
      if (!has_room(*channel, 1)) continue;
      ++counters_.probes;
      // Of zero bytes, so that no key is checked (C9-88): it only asks whether the QP answers.
      post_empty(*channel, Chain::Kind::kProbe, IBV_WR_RDMA_WRITE, 0);
    } else if (now - channel->last_progress > peer_timeout_) {
      fail(id, channel_text(*channel) +
                   ": nothing completed for longer than peer_timeout_s; the "
                   "fabric or the peer's NIC is stalled");
    }
  }
}

bool VerbsBackend::progress(std::vector<Completion>& completions) {
  if (!reaps_.empty()) collect_reaped();
  for (std::size_t rail = 0; rail < rails_.size(); ++rail) drain(rail, kMaxPollRounds);
  if (!gpus_to_flush_.empty()) flush_gpus();
  const bool moved = !completions_.empty();
  std::move(completions_.begin(), completions_.end(), std::back_inserter(completions));
  completions_.clear();
  return moved;
}

/// Before signals are reported: what peers wrote into GPU memory must be what its kernels read.
/// Which memory a signal is about is not known here, so once for all signals and every GPU.
void VerbsBackend::flush_gpus() {
  const auto is_signal = [](const Completion& done) { return done.kind == Completion::Kind::kImm; };
  if (std::none_of(completions_.begin(), completions_.end(), is_signal)) return;
  try {
    for (const auto& gpu : gpus_to_flush_) cuda::flush_remote_writes(*gpu);
    counters_.gpu_flushes += gpus_to_flush_.size();
  } catch (const std::runtime_error& error) {
    std::erase_if(completions_, is_signal);
    for (const auto& [id, peer] : peers_) fail(id, error.what());
  }
}

bool VerbsBackend::arm() {
  try {
    for (const auto& rail : rails_) rail->arm();
  } catch (const std::runtime_error& error) {
    for (std::size_t rail = 0; rail < rails_.size(); ++rail) fail_rail(rail, error.what());
  }
  // What arrived before it was armed makes no event.
  bool quiet = completions_.empty();
  for (std::size_t rail = 0; rail < rails_.size(); ++rail) quiet &= !drain(rail, kMaxPollRounds);
  return quiet;
}

/// Takes up to `rounds` batches off both CQs. @return whether there was anything.
bool VerbsBackend::drain(std::size_t rail, int rounds) {
  std::array<ibv_wc, kPollBatch> wcs;
  bool any = false;
  try {
    for (int round = 0; round < rounds; ++round) {
      const std::size_t sent = rails_[rail]->poll(rails_[rail]->send_cq(), wcs);
      now_ = sent > 0 ? Clock::now() : now_;
      for (std::size_t i = 0; i < sent; ++i) on_send(wcs[i]);
      const std::size_t received = rails_[rail]->poll(rails_[rail]->receive_cq(), wcs);
      for (std::size_t i = 0; i < received; ++i) on_receive(rail, wcs[i]);
      rails_[rail]->recycle_receives(static_cast<std::uint32_t>(received));
      counters_.cqes += sent + received;
      any |= sent + received > 0;
      if (sent < kPollBatch && received < kPollBatch) break;
    }
  } catch (const std::exception& error) {
    fail_rail(rail, error.what());
  }
  return any;
}

void VerbsBackend::on_send(const ibv_wc& wc) {
  const auto found = by_serial_.find(static_cast<std::uint32_t>(wc.wr_id >> 32));
  if (found == by_serial_.end()) return;  // of a QP that was destroyed
  Channel& channel = *found->second;
  const auto sequence = static_cast<std::uint32_t>(wc.wr_id);
  if (wc.status != IBV_WC_SUCCESS) {
    const Chain* chain = channel.queue.find(sequence);
    fail(channel.peer,
         channel_text(channel) + ": " +
             completion_error(wc, chain == nullptr ? "WR" : name_of(chain->kind),
                              lib_.wc_status_str(wc.status)) +
             (rail_states_[channel.rail].port_down ? "; this node's port is DOWN" : ""));
    return;
  }
  const Chain chain = channel.queue.pop(sequence);
  rails_[channel.rail]->return_cqes(chain.wrs);
  channel.last_progress = now_;
  if (!channel.answered) on_first_answer(channel);
  if (chain.kind != Chain::Kind::kWrites) return;
  completions_.push_back({.kind = Completion::Kind::kWritesLanded,
                          .peer = channel.peer,
                          .transfer = chain.transfer,
                          .slices = chain.slices});
}

void VerbsBackend::on_first_answer(Channel& channel) {
  channel.answered = true;
  const auto& channels = peers_.at(channel.peer).channels;
  const bool all = std::all_of(channels.begin(), channels.end(),
                               [](const auto& other) { return other->answered; });
  if (all) completions_.push_back({.kind = Completion::Kind::kReachable, .peer = channel.peer});
}

void VerbsBackend::on_receive(std::size_t rail, const ibv_wc& wc) {
  const auto found = rail_states_[rail].by_qp_number.find(wc.qp_num);
  if (found == rail_states_[rail].by_qp_number.end()) return;  // of a QP that was destroyed
  Channel& channel = *found->second;
  if (wc.status != IBV_WC_SUCCESS) {
    fail(channel.peer, channel_text(channel) + ": " +
                           completion_error(wc, "receive", lib_.wc_status_str(wc.status)));
    return;
  }
  channel.signals.push_back(
      {.imm = ntohl(wc.imm_data), .alone = wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM});
  deliver_signals(channel.peer);
}

void VerbsBackend::deliver_signals(PeerId id) {
  Peer& peer = peers_.at(id);
  if (peer.failed) return;
  for (const auto& channel : peer.channels) {
    while (!channel->signals.empty() && channel->signals.front().alone) pop_signal(*channel);
    if (channel->signals.size() > kMaxEarlySignals) {
      fail(id, channel_text(*channel) + ": its signals never arrived on the other QPs");
    }
  }
  const auto& first = *peer.channels.front();
  const bool complete = std::all_of(peer.channels.begin(), peer.channels.end(),
                                    [&](const auto& channel) { return !channel->signals.empty(); });
  if (!complete) return;
  const std::uint32_t imm = first.signals.front().imm;
  for (const auto& channel : peer.channels) {
    if (channel->signals.front().imm != imm) {
      fail(id, channel_text(*channel) + ": its signal is another one than the first QP's");
      return;
    }
  }
  for (std::size_t i = 1; i < peer.channels.size(); ++i) peer.channels[i]->signals.pop_front();
  pop_signal(*peer.channels.front());
  deliver_signals(id);
}

void VerbsBackend::pop_signal(Channel& channel) {
  completions_.push_back(
      {.kind = Completion::Kind::kImm, .peer = channel.peer, .imm = channel.signals.front().imm});
  channel.signals.pop_front();
}

}  // namespace rkv::verbs
