// SPDX-License-Identifier: Apache-2.0
/// Set-up and fences of the cuda_ipc backend; posting and progress are in ipc_datapath.cc.
#include "cuda/ipc_backend.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "core/error.h"

namespace rkv::cuda {
namespace {

/// A copy between the check of its gate and its end takes microseconds, or as long as another
/// process's kernels hold the GPU between the two.
constexpr std::chrono::milliseconds kIdleTimeout{2000};

/// What pin_memory() hands to register_memory().
struct Exported final : PinnedMemory {
  explicit Exported(Export made) : exported(std::move(made)) {}
  Export exported;
};

}  // namespace

IpcBackend::IpcBackend()
    : gpu_(current_gpu()),
      here_(Exporter::here(*gpu_)),
      kernel_(std::make_shared<const CopyKernel>(gpu_)),
      marks_(gpu_),
      gates_(gpu_),
      gates_export_(export_memory(*gpu_, gates_.memory())),
      mapper_(gpu_) {}

IpcBackend::~IpcBackend() = default;

std::unique_ptr<PinnedMemory> IpcBackend::pin_memory(const MemoryRange& range,
                                                     const MemoryUse& use) {
  if (use.kind != MemoryKind::kCuda) {
    throw std::invalid_argument("register_memory(): backend 'cuda_ipc' reaches GPU memory only");
  }
  const int device = device_of(gpu_->cuda(), range.address);
  if (device != gpu_->device()) {
    throw std::invalid_argument("register_memory(): " + range.text() + " is on GPU " +
                                std::to_string(device) + ", this engine is on " + gpu_->text() +
                                "; make the engine while its memory's GPU is current");
  }
  if (!use.peer_writable) return std::make_unique<Exported>(Export{});
  return std::make_unique<Exported>(export_memory(*gpu_, range));
}

/// The region's blob: its gate, then the memory.
Bytes IpcBackend::register_memory(RegionId region, MemoryRange /*range*/, MemoryUse use,
                                  std::unique_ptr<PinnedMemory> pinned) {
  if (!use.peer_writable) return {};
  auto& exported = dynamic_cast<Exported&>(*pinned);
  const Gates::Slot gate = gates_.open();
  ByteWriter writer;
  writer.put(gate);
  writer.put_bytes(exported.exported.blob);
  regions_[region] = {gate, std::move(pinned)};
  return writer.take();
}

/// A copy that passed the gate before it closed is counted at the gate of its peer.
std::unique_ptr<PinnedMemory> IpcBackend::deregister_memory(RegionId region) {
  const auto found = regions_.find(region);
  if (found == regions_.end()) return nullptr;
  gates_.close(found->second.gate);
  for (auto& [id, peer] : peers_) {
    if (peer.connected) (void)gates_.wait_until_idle(peer.gate, kIdleTimeout);
  }
  auto exported = std::move(found->second.exported);
  regions_.erase(found);
  return exported;
}

/// The endpoint's blob: who exports, the peer's gate, the memory that the gates are in.
Bytes IpcBackend::create_endpoint(PeerId id) {
  Peer& peer = peers_[id];
  peer.gate = gates_.open();
  ByteWriter writer;
  here_.put(writer);
  writer.put(peer.gate);
  writer.put(gates_.memory().address);
  writer.put_string(gates_export_.blob);
  return writer.take();
}

bool IpcBackend::accepts(std::string_view blob) const {
  ByteReader reader(blob);
  return Exporter::get(reader).boot_id == here_.boot_id;
}

/// A peer that cannot be written to from here may still write to us.
void IpcBackend::connect(PeerId id, PeerLink link) {
  Peer& peer = peers_.at(id);
  ByteReader reader(link.blob);
  const Exporter exporter = Exporter::get(reader);
  const auto gate = reader.get<Gates::Slot>("gate");
  const auto gates_address = reader.get<std::uint64_t>("address of the gates");
  const Bytes gates_blob = reader.get_string("gates");
  reader.expect_end();
  peer.reach = reach(*gpu_, here_, exporter);
  // In the same process an address is what it is; CUDA does not map its own exports.
  const bool is_here = exporter.process == here_.process;
  const auto map = [&](const Bytes& blob, std::uint64_t address, std::uint64_t nbytes) {
    return is_here ? Mapped{address, nullptr} : mapper_.map(exporter, blob, nbytes);
  };
  peer.lane = std::make_unique<tcp::Lane>(
      *loop_, std::move(link.sockets.at(0)), no_keys_, lane_stats_,
      [this, id](std::uint32_t epoll_events) { on_lane_ready(id, epoll_events); });
  peer.connected = true;
  if (!peer.reach.possible) return;
  peer.gates = map(gates_blob, gates_address, gates_.memory().nbytes);
  for (const RemoteMemory& memory : link.memory) {
    ByteReader region(memory.blob);
    const auto region_gate = region.get<Gates::Slot>("gate");
    peer.regions.push_back({.remote_base = memory.range.address,
                            .mapped = map(memory.blob.substr(sizeof region_gate),
                                          memory.range.address, memory.range.nbytes),
                            .gate = peer.gates.address + Gates::offset(region_gate)});
  }
  peer.copier = std::make_unique<Copier>(kernel_, marks_, peer.gates.address + Gates::offset(gate));
}

Path IpcBackend::path(PeerId id) const {
  const Reach& way = peers_.at(id).reach;
  return {.backend = "cuda_ipc",
          .description = way.possible ? "cuda_ipc: " + way.text : way.text,
          .writes = way.possible};
}

/// The lane is an authenticated connection and the engine's heartbeat runs beside it.
void IpcBackend::probe(PeerId id) {
  Peer& peer = peers_.at(id);
  if (const std::string error = peer.copier ? peer.copier->error() : ""; !error.empty()) {
    fail(id, peer, "the GPU reports " + error);
  }
  if (std::exchange(peer.probed, true)) return;
  completions_.push_back({.kind = Completion::Kind::kReachable, .peer = id});
}

/// Whether the GPU still answers or not: if it does not, its memory went with its context.
void IpcBackend::shut_out(const Peer& peer) noexcept {
  try {
    gates_.close(peer.gate);
    (void)gates_.wait_until_idle(peer.gate, kIdleTimeout);
  } catch (const std::exception&) {
  }
}

void IpcBackend::close_peer(PeerId id) {
  const auto found = peers_.find(id);
  if (found == peers_.end()) return;
  shut_out(found->second);
  peers_.erase(found);  // waits for our own copies, then unmaps
  std::erase_if(completions_, [id](const Completion& done) { return done.peer == id; });
}

/// close_peer() follows, after the engine told the peer why.
void IpcBackend::fail(PeerId id, Peer& peer, const std::string& reason) {
  if (std::exchange(peer.failed, true)) return;
  peer.lane->stop();
  completions_.push_back({.kind = Completion::Kind::kPeerError, .peer = id, .reason = reason});
}

void IpcBackend::add_stats(Stats& stats) const {
  stats["cuda_launches"] = launches_;
  stats["cuda_rows"] = rows_launched_;
}

}  // namespace rkv::cuda
