// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <future>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/backend.h"
#include "core/config.h"
#include "verbs/chain_builder.h"
#include "verbs/device_choice.h"
#include "verbs/endpoint_blob.h"
#include "verbs/queue_pair.h"
#include "verbs/rail.h"
#include "verbs/registration.h"
#include "verbs/send_queue.h"

namespace rkv::verbs {

/// One-sided writes over RC queue pairs: the backend of a cluster.
///
/// Writes are striped over all QPs of a peer and all rails; nothing is assumed about the order of
/// two QPs. A signal therefore goes out on every QP as an empty SEND_WITH_IMM, and the peer
/// delivers it when all have arrived. Where only one QP is busy, as with a small transfer, the
/// signal is the immediate of its last WRITE, and the peer delivers it at once.
///
/// Set-up is in verbs_backend.cc, the end of peers in verbs_teardown.cc, the data path in
/// verbs_datapath.cc.
class VerbsBackend final : public Backend {
 public:
  /// Opens every port of `choice`. `lib` must outlive the backend. `load_cuda` is called when the
  /// first GPU memory is registered.
  /// @throw std::runtime_error with call, device, errno and remedy.
  VerbsBackend(const EngineConfig& config, const Ibverbs& lib, Choice choice,
               const cuda::Cuda& (*load_cuda)() = &cuda::load_cuda);
  ~VerbsBackend() override;

  [[nodiscard]] std::string_view name() const override { return "verbs"; }
  [[nodiscard]] std::uint8_t lanes() const override { return 0; }
  [[nodiscard]] std::string describe() const override { return choice_.text(); }
  [[nodiscard]] std::vector<std::size_t> cpus() const override;
  [[nodiscard]] bool polls() const override { return true; }
  [[nodiscard]] std::chrono::microseconds default_spin() const override;
  /// A NIC copies by itself; Soft-RoCE does it within ibv_post_send.
  [[nodiscard]] std::uint64_t small_write() const override { return 1 << 20; }
  void attach(EventLoop& loop) override;
  [[nodiscard]] std::unique_ptr<PinnedMemory> pin_memory(const MemoryRange& range,
                                                         const MemoryUse& use) override;
  Bytes register_memory(RegionId region, MemoryRange range, MemoryUse use,
                        std::unique_ptr<PinnedMemory> pinned) override;
  [[nodiscard]] std::unique_ptr<PinnedMemory> deregister_memory(RegionId region) override;
  Bytes create_endpoint(PeerId peer) override;
  void connect(PeerId peer, PeerLink link) override;
  void probe(PeerId peer) override;
  [[nodiscard]] rkv::Path path(PeerId peer) const override;
  Posted post_writes(PeerId peer, TransferId transfer, std::span<const WriteSlice> slices,
                     std::optional<std::uint32_t> imm) override;
  bool post_signal(PeerId peer, std::uint32_t imm) override;
  void close_peer(PeerId peer) override;
  bool progress(std::vector<Completion>& completions) override;
  [[nodiscard]] bool arm() override;
  void add_stats(Stats& stats) const override;

 private:
  struct Signal {
    std::uint32_t imm = 0;
    bool alone = false;  ///< Comes on this channel only.
  };

  /// One QP of a peer.
  struct Channel {
    Channel(PeerId owner, std::uint32_t own_serial, std::size_t own_rail, Rail& on,
            std::uint32_t send_wrs)
        : peer(owner), serial(own_serial), rail(own_rail), qp(on, send_wrs), queue(send_wrs) {}

    PeerId peer;
    std::uint32_t serial;  ///< Upper half of its wr_ids; never reused.
    std::size_t rail;
    QueuePair qp;
    SendQueue queue;
    std::size_t remote_rail = 0;
    std::string path_text = {};
    const KeysByRegion* remote_keys = nullptr;
    std::deque<Signal> signals = {};  ///< Arrived; wait for their like on other channels.
    bool answered = false;            ///< Something completed since connect().
    bool dirty = false;               ///< Carried something since the last signal on all channels.
    Clock::time_point last_progress = {};  ///< Last completion, or first post after idleness.
  };

  struct Peer {
    Bytes blob;  ///< create_endpoint()'s.
    std::vector<std::unique_ptr<Channel>> channels;
    std::vector<KeysByRegion> remote_keys;  ///< By the peer's rail.
    bool failed = false;                    ///< Reported; waits for close_peer().
  };

  struct RailState {
    std::unordered_map<std::uint32_t, Channel*> by_qp_number = {};
    std::uint64_t bytes_posted = 0;
    bool port_down = false;
  };

  /// QPs that are being destroyed.
  struct Reap {
    std::future<void> done = {};
    std::vector<std::uint32_t> wrs = {};  ///< Places in the send CQs that they hold, by rail.
  };

  // Set-up and tear-down.
  void list_gpus_to_flush();
  [[nodiscard]] RailAddress own_address(std::size_t rail) const;
  [[nodiscard]] Path path_to(std::size_t rail, const RailAddress& remote) const;
  void connect_rails(Peer& peer, const std::vector<RailEndpoint>& remote);
  void destroy_channels(std::vector<std::unique_ptr<Channel>> channels);
  void collect_reaped();
  void take_async_events(std::size_t rail);
  void on_async_event(std::size_t rail, const ibv_async_event& event);
  [[nodiscard]] std::string channel_text(const Channel& channel) const;
  void fail(PeerId peer, const std::string& reason);
  void fail_rail(std::size_t rail, const std::string& reason);

  // Data path.
  static constexpr int kDrainAll = std::numeric_limits<int>::max();  ///< Rounds of drain().
  [[nodiscard]] Channel* next_channel(Peer& peer) const;
  [[nodiscard]] ChainLimits limits_of(const Channel& channel, std::uint64_t nbytes) const;
  [[nodiscard]] bool has_room(const Channel& channel, std::uint32_t wrs) const;
  [[nodiscard]] static bool suffices_for_signal(const Peer& peer, const Channel& channel);
  void post(Channel& channel, const Chain& chain, ibv_send_wr* wrs);
  void post_empty(Channel& channel, Chain::Kind kind, ibv_wr_opcode opcode, std::uint32_t imm);
  bool drain(std::size_t rail, int rounds);
  void on_send(const ibv_wc& wc);
  void on_first_answer(Channel& channel);
  void on_receive(std::size_t rail, const ibv_wc& wc);
  void deliver_signals(PeerId peer);
  void pop_signal(Channel& channel);
  void flush_gpus();

  const Ibverbs& lib_;
  const cuda::Cuda& (*const load_cuda_)();
  const Choice choice_;
  const std::uint64_t block_size_;
  const Clock::duration peer_timeout_;
  const std::uint8_t traffic_class_;
  const std::uint8_t service_level_;
  PinnedBytes pinned_ = 0;
  std::vector<std::shared_ptr<Rail>> rails_;  // before all that lives on them
  std::size_t qps_per_rail_ = 0;
  std::uint32_t send_wrs_ = 0;  // of one QP

  std::vector<KeysByRegion> local_keys_;  // by rail
  std::unordered_map<RegionId, std::unique_ptr<Registration>> registrations_;
  std::vector<std::shared_ptr<const cuda::Gpu>> gpus_to_flush_;  // each once
  std::vector<RailState> rail_states_;
  std::unordered_map<std::uint32_t, Channel*> by_serial_;
  std::uint32_t next_serial_ = 1;
  std::unordered_map<PeerId, Peer> peers_;
  ChainBuilder builder_;
  std::vector<Reap> reaps_;
  std::vector<Completion> completions_;
  Clock::time_point now_;  // of the completions being handled

  struct Counters {
    std::uint64_t wrs = 0;
    std::uint64_t sges = 0;
    std::uint64_t doorbells = 0;
    std::uint64_t cqes = 0;
    std::uint64_t posts_refused = 0;
    std::uint64_t probes = 0;
    std::uint64_t async_events = 0;
    std::uint64_t gpu_flushes = 0;
  } counters_;
};

}  // namespace rkv::verbs
