// SPDX-License-Identifier: Apache-2.0
#include "core/engine.h"

#include <algorithm>
#include <future>
#include <stdexcept>
#include <utility>

#include "core/error.h"
#include "core/rows.h"

namespace rkv {
namespace {

/// The progress thread never blocks, so an answer takes microseconds; a loaded host may starve it.
constexpr std::chrono::seconds kAnswerTimeout{60};

/// So many take their caller less to post than to hand over.
constexpr std::size_t kSmallSlices = 256;

bool is_small(const std::vector<WriteSlice>& slices, std::uint64_t max_nbytes) {
  if (slices.size() > kSmallSlices) return false;
  std::uint64_t nbytes = 0;
  for (const WriteSlice& slice : slices) nbytes += slice.nbytes;
  return nbytes <= max_nbytes;
}

}  // namespace

Engine::Engine(const EngineConfig& config, std::uint64_t incarnation,
               std::unique_ptr<Backend> backend, std::unique_ptr<Marks> marks)
    : config_(config),
      incarnation_(incarnation),
      marks_(std::move(marks)),
      progress_(config, incarnation, std::move(backend), *marks_, events_,
                [this](PeerId peer, const std::string& reason) {
                  const std::lock_guard lock(mutex_);
                  const auto found = peers_.find(peer);
                  if (found != peers_.end()) found->second.lost_reason = reason;
                }) {
  if (incarnation == 0) throw std::invalid_argument("incarnation is 0; it must not be");
  progress_.start();
}

Engine::~Engine() { close(); }

void Engine::queue(EventLoop::Command command) {
  if (closed_) throw std::runtime_error("the engine is closed");
  progress_.queue(std::move(command));
}

/// mutex_ is not held: a turn may find a peer lost.
void Engine::run_queued() {
  if (!progress_.take_turn()) progress_.wake();
}

template <class Function>
auto Engine::ask(const char* call, Function function) {
  using Answer = decltype(function());
  auto task = std::make_shared<std::packaged_task<Answer()>>(std::move(function));
  std::future<Answer> answer = task->get_future();
  {
    const std::lock_guard lock(mutex_);
    queue([task] { (*task)(); });
  }
  run_queued();
  if (answer.wait_for(kAnswerTimeout) != std::future_status::ready) {
    throw std::runtime_error(std::string(call) + ": the progress thread gave no answer for " +
                             std::to_string(kAnswerTimeout.count()) + " s");
  }
  return answer.get();
}

Engine::PeerEntry& Engine::find_peer(PeerId peer, const char* call) {
  const auto found = peers_.find(peer);
  if (found == peers_.end()) {
    throw std::invalid_argument(std::string(call) + ": no peer " + std::to_string(peer) +
                                "; it was closed, or is another engine's");
  }
  return found->second;
}

Engine::PeerEntry& Engine::find_usable_peer(PeerId peer, const char* call) {
  PeerEntry& entry = find_peer(peer, call);
  if (!entry.lost_reason.empty()) {
    throw std::runtime_error(std::string(call) + ": " + entry.lost_reason +
                             "; close it and create a new endpoint");
  }
  if (!entry.connecting) {
    throw std::runtime_error(std::string(call) + ": peer " + entry.label +
                             ": connect() was not called");
  }
  return entry;
}

RegisteredMemory Engine::register_memory(MemoryRange range, MemoryUse use) {
  if (range.address == 0 || range.nbytes == 0 || range.nbytes > UINT64_MAX - range.address) {
    throw std::invalid_argument("register_memory(): ptr " + std::to_string(range.address) +
                                " with nbytes " + std::to_string(range.nbytes) + " is no memory");
  }
  RegionId id = 0;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) throw std::runtime_error("the engine is closed");
    id = next_region_++;
  }
  auto pinned = progress_.pin_memory(range, use);
  Bytes blob =
      ask("register_memory()", [this, id, range, use, pinned = std::move(pinned)]() mutable {
        return progress_.register_memory(id, range, use, std::move(pinned));
      });
  {
    const std::lock_guard lock(mutex_);
    local_regions_ = std::make_shared<RegionIndex>(local_regions_->with({id, range}));
  }
  if (!use.peer_writable) return {id, range, {}};
  const MemoryDescriptor descriptor{.backend = std::string(backend()),
                                    .incarnation = incarnation_,
                                    .range = range,
                                    .blob = std::move(blob)};
  return {id, range, descriptor.encode()};
}

void Engine::deregister_memory(RegionId region) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    local_regions_ = std::make_shared<RegionIndex>(local_regions_->without(region));
  }
  // Unpinned here, when the answer is destroyed.
  (void)ask("LocalMemory.close()", [this, region] { return progress_.deregister_memory(region); });
}

CreatedEndpoint Engine::create_endpoint(const std::string& label) {
  EndpointDescriptor descriptor{.backend = std::string(backend()),
                                .incarnation = incarnation_,
                                .token = random_token(),
                                .host = progress_.address().host,
                                .port = progress_.address().port,
                                .lanes = progress_.lanes()};
  PeerId peer = 0;
  {
    const std::lock_guard lock(mutex_);
    peer = next_peer_++;
    peers_[peer] = {.label = label, .token = descriptor.token};
  }
  descriptor.blob = ask("create_endpoint()", [this, peer, label, token = descriptor.token] {
    return progress_.create_endpoint(peer, label, token);
  });
  return {peer, descriptor.encode()};
}

EndpointDescriptor Engine::decode_endpoint(std::string_view bytes) const {
  EndpointDescriptor descriptor;
  try {
    descriptor = EndpointDescriptor::decode(bytes);
  } catch (const FormatError& error) {
    throw FormatError(std::string("connect(): the descriptor is ") + error.what());
  }
  if (descriptor.backend != backend()) {
    throw FormatError("connect(): the descriptor is of backend '" + descriptor.backend +
                      "', this engine's is '" + std::string(backend()) + "'");
  }
  if ((descriptor.lanes == 0) != (progress_.lanes() == 0)) {
    throw FormatError("connect(): the descriptor offers " + std::to_string(descriptor.lanes) +
                      " data lanes");
  }
  return descriptor;
}

std::vector<RemoteMemory> Engine::decode_memory(const std::vector<Bytes>& memory,
                                                std::uint64_t incarnation) const {
  std::vector<RemoteMemory> decoded;
  for (const Bytes& bytes : memory) {
    const std::string name = "connect(): memory descriptor " + std::to_string(decoded.size());
    MemoryDescriptor descriptor;
    try {
      descriptor = MemoryDescriptor::decode(bytes);
    } catch (const FormatError& error) {
      throw FormatError(name + " is " + error.what());
    }
    if (descriptor.backend != backend()) {
      throw FormatError(name + " is of backend '" + descriptor.backend + "'");
    }
    if (descriptor.incarnation != incarnation) {
      throw FormatError(name + " is of incarnation " + std::to_string(descriptor.incarnation) +
                        ", the endpoint of incarnation " + std::to_string(incarnation));
    }
    decoded.push_back({descriptor.range, std::move(descriptor.blob)});
  }
  return decoded;
}

void Engine::connect(PeerId peer, std::string_view descriptor, const std::vector<Bytes>& memory) {
  const EndpointDescriptor remote = decode_endpoint(descriptor);
  std::vector<RemoteMemory> decoded = decode_memory(memory, remote.incarnation);
  std::vector<RegionIndex::Region> regions;
  for (const RemoteMemory& region : decoded) {
    regions.push_back({static_cast<RegionId>(regions.size()), region.range});
  }
  {
    const std::lock_guard lock(mutex_);
    PeerEntry& entry = find_peer(peer, "connect()");
    if (entry.connecting) {
      throw std::runtime_error("connect(): peer " + entry.label + ": already called");
    }
    if (entry.token == remote.token) {
      throw FormatError("connect(): the descriptor is this endpoint's own");
    }
    queue([this, peer, remote, decoded = std::move(decoded)]() mutable {
      progress_.connect(peer, remote, std::move(decoded));
    });
    entry.connecting = true;
    entry.remote_regions = std::make_shared<RegionIndex>(std::move(regions));
  }
  run_queued();
}

TransferId Engine::write(PeerId peer, std::span<const std::int64_t> local,
                         std::span<const std::int64_t> remote, std::span<const std::int64_t> nbytes,
                         std::optional<std::uint32_t> imm, Mark after) {
  if (local.size() != nbytes.size() || remote.size() != nbytes.size()) {
    throw std::invalid_argument(
        "write(): src, dst and nbytes have " + std::to_string(local.size()) + ", " +
        std::to_string(remote.size()) + " and " + std::to_string(nbytes.size()) + " rows");
  }
  std::shared_ptr<const RegionIndex> local_regions;
  std::shared_ptr<const RegionIndex> remote_regions;
  {
    const std::lock_guard lock(mutex_);
    remote_regions = find_usable_peer(peer, "write()").remote_regions;
    local_regions = local_regions_;
  }
  Slices slices = slice_pool_->take();
  slice_rows({local, remote, nbytes}, *local_regions, *remote_regions,
             static_cast<std::uint64_t>(config_.block_size), *slices);
  const bool small = is_small(*slices, progress_.small_write());
  TransferId id = 0;
  {
    const std::lock_guard lock(mutex_);
    find_usable_peer(peer, "write()");  // it may have been lost meanwhile
    id = next_transfer_++;
    queue([this, peer, id, rows = nbytes.size(), imm, after, slices = std::move(slices)]() mutable {
      progress_.submit(peer, id, rows, std::move(slices), imm, after);
    });
  }
  if (small) {
    run_queued();
  } else {
    progress_.wake();
  }
  return id;
}

void Engine::cancel(PeerId peer, std::vector<TransferId> ids) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;  // they have failed
    queue([this, peer, ids = std::move(ids)] { progress_.cancel(peer, ids); });
  }
  run_queued();
}

void Engine::signal(PeerId peer, std::uint32_t imm) {
  {
    const std::lock_guard lock(mutex_);
    find_usable_peer(peer, "signal()");
    queue([this, peer, imm] { progress_.signal(peer, imm); });
  }
  run_queued();
}

void Engine::send(PeerId peer, Bytes message) {
  if (message.size() > kMaxMessageBytes) {
    throw std::invalid_argument("send(): " + std::to_string(message.size()) +
                                " bytes; a message holds at most " +
                                std::to_string(kMaxMessageBytes));
  }
  {
    const std::lock_guard lock(mutex_);
    find_usable_peer(peer, "send()");
    queue([this, peer, message = std::move(message)]() mutable {
      progress_.send(peer, std::move(message));
    });
  }
  run_queued();
}

std::vector<Event> Engine::poll(std::size_t max_events) {
  std::vector<Event> events = events_.poll(max_events);
  if (!events.empty()) return events;
  progress_.attend();
  return events_.poll(max_events);
}

bool Engine::wait(std::chrono::duration<double> timeout) {
  const Clock::time_point start = Clock::now();
  const auto spin = std::min<std::chrono::duration<double>>(progress_.caller_spin(), timeout);
  while (Clock::now() - start < spin) {
    if (!events_.empty()) return true;
    progress_.attend();
  }
  progress_.leave();
  return events_.wait(timeout - (Clock::now() - start));
}

void Engine::close_peer(PeerId peer) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_ || peers_.erase(peer) == 0) return;  // fenced already
  }
  ask("close_peer()", [this, peer] { progress_.close_peer(peer); });
}

Stats Engine::stats() {
  return ask("stats()", [this] { return progress_.stats(); });
}

Stats Engine::peer_stats(PeerId peer) {
  {
    const std::lock_guard lock(mutex_);
    find_peer(peer, "peer_stats()");
  }
  return ask("peer_stats()", [this, peer] { return progress_.peer_stats(peer); });
}

Path Engine::peer_path(PeerId peer) {
  {
    const std::lock_guard lock(mutex_);
    find_usable_peer(peer, "peer_path()");
  }
  return ask("peer_path()", [this, peer] { return progress_.peer_path(peer); });
}

void Engine::close() {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(closed_, true)) return;
  }
  progress_.stop();
}

}  // namespace rkv
