// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "core/backend.h"
#include "cuda/copier.h"
#include "cuda/gates.h"
#include "cuda/ipc_memory.h"
#include "cuda/stream_marks.h"
#include "tcp/lane.h"

namespace rkv::cuda {

/// One-sided writes between GPUs of one host, the same GPU included: a copy kernel of the writer
/// stores into the peer's memory, which it mapped once. Signals go over one TCP lane when the
/// copies before them are done.
///
/// Set-up and fences are in ipc_backend.cc, the data path in ipc_datapath.cc.
class IpcBackend final : public Backend {
 public:
  /// On the GPU that is current on the calling thread. @throw std::runtime_error
  IpcBackend();
  ~IpcBackend() override;

  [[nodiscard]] std::string_view name() const override { return "cuda_ipc"; }
  [[nodiscard]] std::uint8_t lanes() const override { return 1; }
  /// A row in host memory is no entry of a NIC's queue.
  [[nodiscard]] std::size_t window(std::size_t queue_depth) const override {
    return std::max(queue_depth, Copier::kMaxRows);
  }
  void attach(EventLoop& loop) override { loop_ = &loop; }
  [[nodiscard]] std::string describe() const override { return gpu_->text(); }
  [[nodiscard]] bool polls() const override { return true; }
  [[nodiscard]] std::unique_ptr<PinnedMemory> pin_memory(const MemoryRange& range,
                                                         const MemoryUse& use) override;
  Bytes register_memory(RegionId region, MemoryRange range, MemoryUse use,
                        std::unique_ptr<PinnedMemory> pinned) override;
  [[nodiscard]] std::unique_ptr<PinnedMemory> deregister_memory(RegionId region) override;
  Bytes create_endpoint(PeerId peer) override;
  [[nodiscard]] bool accepts(std::string_view blob) const override;
  void connect(PeerId peer, PeerLink link) override;
  [[nodiscard]] Path path(PeerId peer) const override;
  void probe(PeerId peer) override;
  Posted post_writes(PeerId peer, TransferId transfer, std::span<const WriteSlice> slices,
                     std::optional<std::uint32_t> imm) override;
  bool post_signal(PeerId peer, std::uint32_t imm) override;
  void close_peer(PeerId peer) override;
  bool progress(std::vector<Completion>& completions) override;
  [[nodiscard]] bool arm() override;
  void add_stats(Stats& stats) const override;

 private:
  /// A region of a peer, as mapped here.
  struct RemoteRegion {
    std::uint64_t remote_base;
    Mapped mapped;
    DevicePtr gate;
  };
  struct Launch {
    TransferId transfer;
    std::size_t rows;
    Mark mark;
  };
  struct Peer {
    Reach reach = {};
    Gates::Slot gate = 0;  ///< Ours, by which the peer enters our memory.
    bool connected = false;
    Mapped gates = {};  ///< The peer's; before what uses it.
    std::vector<RemoteRegion> regions = {};
    std::unique_ptr<Copier> copier = nullptr;
    std::unique_ptr<tcp::Lane> lane = nullptr;
    std::deque<std::variant<Launch, std::uint32_t>> pending = {};  ///< Launches and signals.
    bool probed = false;
    bool failed = false;
  };

  void on_lane_ready(PeerId peer, std::uint32_t epoll_events);
  bool advance(PeerId id, Peer& peer);
  void shut_out(const Peer& peer) noexcept;
  void fail(PeerId id, Peer& peer, const std::string& reason);

  const std::shared_ptr<const Gpu> gpu_;
  const Exporter here_;
  const std::shared_ptr<const CopyKernel> kernel_;
  StreamMarks marks_;
  Gates gates_;
  const Export gates_export_;
  Mapper mapper_;
  EventLoop* loop_ = nullptr;
  const tcp::KeyTable no_keys_;  ///< Nothing is written over the lane.
  tcp::LaneStats lane_stats_;
  tcp::Inbox inbox_;
  /// What a peer-writable region needs: its gate, and what keeps it mappable.
  struct LocalRegion {
    Gates::Slot gate;
    std::unique_ptr<PinnedMemory> exported;
  };
  std::unordered_map<RegionId, LocalRegion> regions_;
  std::unordered_map<PeerId, Peer> peers_;
  std::vector<Completion> completions_;
  std::vector<CopyRow> rows_;
  std::uint64_t launches_ = 0;
  std::uint64_t rows_launched_ = 0;
};

}  // namespace rkv::cuda
