// SPDX-License-Identifier: Apache-2.0
/// The progress loop and the commands of the data path; peers' lives are in progress_peers.cc.
#include "core/progress.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <utility>

namespace rkv {
namespace {

constexpr std::chrono::milliseconds kMaxTick{100};
constexpr unsigned kPollsPerSocketCheck = 32;  ///< Data does not come by sockets; heartbeats do.
/// A caller that looked for data is expected back within this; nothing waits longer for it.
constexpr std::chrono::milliseconds kAttended{1};
/// Between two looks at a mark: a layer takes a GPU tens to thousands of microseconds.
constexpr std::chrono::microseconds kMarkInterval{20};
constexpr int kMaxCallerRounds = 16;  ///< Then the progress thread goes on.

}  // namespace

Progress::Progress(const EngineConfig& config, std::uint64_t incarnation,
                   std::unique_ptr<Backend> backend, const Marks& marks, EventQueue& events,
                   OnLost on_lost)
    : config_(config),
      incarnation_(incarnation),
      marks_(marks),
      tick_interval_(std::min<Clock::duration>(config.heartbeat_interval() / 2, kMaxTick)),
      events_(events),
      on_lost_(std::move(on_lost)),
      backend_(std::move(backend)),
      spin_(config.spin_us == EngineConfig::kAuto ? backend_->default_spin()
                                                  : std::chrono::microseconds(config.spin_us)),
      acceptor_(loop_, config.bind_host, incarnation,
                [this](PeerId peer, std::uint8_t lane, UniqueFd fd) {
                  on_socket(peer, lane, std::move(fd));
                }),
      dialer_(
          loop_,
          [this](PeerId peer, std::uint8_t lane, UniqueFd fd) {
            on_socket(peer, lane, std::move(fd));
          },
          [this](PeerId peer, const std::string& reason) { lose(get(peer), reason); }),
      next_tick_(Clock::now() + tick_interval_) {
  backend_->attach(loop_);
}

Progress::~Progress() { stop(); }

void Progress::start() {
  thread_ = std::thread([this] { run(); });
}

void Progress::stop() {
  if (!thread_.joinable()) return;
  loop_.post([this] {
    while (!connections_.empty()) close_peer(connections_.begin()->first, "its engine was closed");
    for (const RegionId region : regions_) (void)backend_->deregister_memory(region);
    regions_.clear();
    stopping_ = true;
  });
  thread_.join();
}

void Progress::run() {
  pthread_setname_np(pthread_self(), "rkv-progress");
  // The default slack of 50 us would triple kMarkInterval.
  prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
  move_to_cpus();
  std::unique_lock turn(turn_);
  Clock::time_point last_busy = Clock::now();
  bool again = false;
  unsigned polls = 0;
  while (!stopping_) {
    const Clock::time_point now = Clock::now();
    // What did something may have left work that no file descriptor will announce.
    const bool attended = is_attended(now);
    const bool poll_only = again || (!attended && (now - last_busy < spin_ || !backend_->arm()));
    EventLoop::Ran ran;
    if (poll_only && backend_->polls() && ++polls % kPollsPerSocketCheck != 0) {
      ran.commands = loop_.run_commands();
    } else {
      std::chrono::nanoseconds sleep = until_tick(now);
      if (attended) sleep = std::min<std::chrono::nanoseconds>(sleep, kAttended);
      if (waits_for_mark()) sleep = std::min<std::chrono::nanoseconds>(sleep, kMarkInterval);
      if (poll_only) sleep = {};
      ran = loop_.run_once(sleep, turn);
    }
    // An event of a completion channel is nothing by itself: a caller may have polled the CQ.
    const bool busy = move_data() || ran.commands || (ran.handlers && !backend_->polls());
    if (busy) last_busy = now;
    again = busy || ran.handlers;
    tick(now);
  }
}

bool Progress::take_turn() noexcept {
  const std::unique_lock turn(turn_, std::try_to_lock);
  if (!turn) return false;
  for (int round = 0; loop_.run_commands() | move_data(); ++round) {
    if (round < kMaxCallerRounds) continue;
    loop_.wake();
    break;
  }
  if (waits_for_mark()) loop_.wake();  // nothing else would end the progress thread's sleep
  return true;
}

void Progress::attend() noexcept {
  if (!backend_->polls()) return;
  attended_until_.store(Clock::now() + kAttended, std::memory_order_relaxed);
  (void)take_turn();
}

void Progress::leave() noexcept {
  if (attended_until_.exchange({}, std::memory_order_relaxed) == Clock::time_point()) return;
  const std::unique_lock turn(turn_, std::try_to_lock);
  if (!turn || !backend_->arm()) loop_.wake();
}

/// Completions make room for what is queued, and that must not wait for a caller.
bool Progress::is_attended(Clock::time_point now) const {
  return now < attended_until_.load(std::memory_order_relaxed) &&
         std::all_of(
             connections_.begin(), connections_.end(),
             [](const auto& entry) { return entry.second->queue.empty(); });
}

bool Progress::waits_for_mark() const {
  return std::any_of(connections_.begin(), connections_.end(), [](const auto& entry) {
    return entry.second->state == Connection::State::kConnected &&
           entry.second->queue.waits_for_mark();
  });
}

/// @return whether there was anything to move.
bool Progress::move_data() {
  const bool posted = post_queued();
  return handle_completions() || posted;
}

/// A thread may be moved while it runs; a refusal only costs speed.
void Progress::move_to_cpus() const {
  std::vector<std::size_t> cpus = backend_->cpus();
  if (config_.progress_cpu != EngineConfig::kAuto) {
    cpus = {static_cast<std::size_t>(config_.progress_cpu)};
  }
  if (cpus.empty()) return;
  cpu_set_t allowed;
  cpu_set_t wanted;
  CPU_ZERO(&wanted);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  for (const std::size_t cpu : cpus) {
    if (cpu < CPU_SETSIZE && CPU_ISSET(cpu, &allowed)) CPU_SET(cpu, &wanted);
  }
  if (CPU_COUNT(&wanted) > 0) pthread_setaffinity_np(pthread_self(), sizeof wanted, &wanted);
}

bool Progress::post_queued() {
  bool posted = false;
  for (auto& [id, connection] : connections_) {
    if (connection->state != Connection::State::kConnected || connection->queue.empty()) continue;
    const Clock::time_point start = Clock::now();
    if (!connection->queue.post(*backend_)) continue;
    counters_.posting += Clock::now() - start;
    posted = true;
  }
  return posted;
}

bool Progress::handle_completions() {
  const bool moved = backend_->progress(completions_);
  for (const Completion& completion : completions_) handle(completion);
  completions_.clear();
  return moved;
}

void Progress::handle(const Completion& completion) {
  Connection& connection = get(completion.peer);
  if (connection.state == Connection::State::kLost) return;
  ++counters_.completions;
  switch (completion.kind) {
    case Completion::Kind::kWritesLanded:
      if (const auto done = connection.queue.landed(completion.transfer, completion.slices)) {
        complete_transfer(connection, done->id, done->posted_at);
      }
      return;
    case Completion::Kind::kImm:
      // Its READY may still be on the way on the control connection; a signal proves as much.
      mark_connected(connection);
      ++counters_.imms_received;
      ++connection.imms_received;
      events_.push({.kind = EventKind::kImm, .peer = completion.peer, .imm = completion.imm});
      return;
    case Completion::Kind::kReachable:
      mark_connected(connection);
      return;
    case Completion::Kind::kPeerError:
      lose(connection, completion.reason);
      return;
  }
}

void Progress::submit(PeerId peer, TransferId id, std::size_t rows, Slices slices,
                      std::optional<std::uint32_t> imm, Mark after) {
  Connection& connection = get(peer);
  ++counters_.transfers;
  counters_.descriptors_in += rows;
  counters_.descriptors_out += slices->size();
  std::string failure;
  if (connection.state == Connection::State::kLost) failure = connection.lost_reason;
  const bool deregistered = std::any_of(slices->begin(), slices->end(), [this](const auto& slice) {
    return !regions_.contains(slice.local_region);
  });
  if (deregistered) failure = "its source memory was deregistered";
  if (!failure.empty()) {
    fail_transfer(connection, id, failure);
    return;
  }
  if (slices->empty()) {
    complete_transfer(connection, id, Clock::now());
    if (imm) signal(peer, *imm);
    return;
  }
  std::uint64_t nbytes = 0;
  for (const WriteSlice& slice : *slices) nbytes += slice.nbytes;
  connection.bytes_submitted += nbytes;
  counters_.bytes_submitted += nbytes;
  if (imm) ++counters_.signals_sent;
  connection.queue.add_write(id, std::move(slices), imm, after);
}

void Progress::complete_transfer(Connection& connection, TransferId id,
                                 Clock::time_point posted_at) {
  ++counters_.transfers_done;
  ++connection.transfers_done;
  events_.push({.kind = EventKind::kTransferDone,
                .peer = connection.id,
                .id = id,
                .posted_ns = nanoseconds(posted_at)});
}

void Progress::fail_transfer(Connection& connection, TransferId id, const std::string& reason) {
  ++counters_.transfers_failed;
  ++connection.transfers_failed;
  events_.push(
      {.kind = EventKind::kTransferFailed, .peer = connection.id, .id = id, .reason = reason});
}

void Progress::cancel(PeerId peer, const std::vector<TransferId>& ids) {
  const auto found = connections_.find(peer);
  if (found == connections_.end()) return;
  for (const TransferId id : ids) {
    if (found->second->queue.drop(id)) fail_transfer(*found->second, id, "it was cancelled");
  }
}

void Progress::signal(PeerId peer, std::uint32_t imm) {
  Connection& connection = get(peer);
  if (connection.state == Connection::State::kLost) return;
  ++counters_.signals_sent;
  connection.queue.add_signal(imm);
}

Bytes Progress::register_memory(RegionId region, MemoryRange range, MemoryUse use,
                                std::unique_ptr<PinnedMemory> pinned) {
  Bytes blob = backend_->register_memory(region, range, use, std::move(pinned));
  regions_.insert(region);
  return blob;
}

std::unique_ptr<PinnedMemory> Progress::deregister_memory(RegionId region) {
  regions_.erase(region);
  for (auto& [id, connection] : connections_) {
    if (connection->queue.reads_from(region)) {
      lose(*connection, "memory was deregistered while writes out of it were outstanding");
    }
  }
  return backend_->deregister_memory(region);
}

Stats Progress::stats() const {
  Stats stats;
  stats["transfers"] = counters_.transfers;
  stats["transfers_done"] = counters_.transfers_done;
  stats["transfers_failed"] = counters_.transfers_failed;
  stats["descriptors_in"] = counters_.descriptors_in;
  stats["descriptors_out"] = counters_.descriptors_out;
  stats["bytes_submitted"] = counters_.bytes_submitted;
  stats["completions"] = counters_.completions;
  stats["signals_sent"] = counters_.signals_sent;
  stats["imms_received"] = counters_.imms_received;
  stats["messages_sent"] = counters_.messages_sent;
  stats["messages_received"] = counters_.messages_received;
  stats["peers"] = std::uint64_t{connections_.size()};
  stats["peers_lost"] = counters_.peers_lost;
  stats["refused_hellos"] = acceptor_.refused_hellos();
  stats["wakeups"] = loop_.wakeups();
  stats["posting_s"] = std::chrono::duration<double>(counters_.posting).count();
  backend_->add_stats(stats);
  return stats;
}

}  // namespace rkv
