// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fake_network.h"
#include "verbs/verbs_backend.h"

namespace rkv::verbs {

/// A verbs backend on a fake fabric with a registered buffer, driven by the test's own thread: what
/// happens when is up to the test.
class BackendNode {
 public:
  /// What was reported of one peer.
  struct Seen {
    bool reachable = false;
    std::map<TransferId, std::size_t> landed = {};  ///< Slices.
    std::vector<std::uint32_t> imms = {};
    std::vector<std::string> errors = {};
  };

  BackendNode(FakeFabric& fabric, const std::vector<std::string>& devices,
              const EngineConfig& config = {}, std::size_t nbytes = 1 << 20,
              const Ibverbs& lib = FakeFabric::table(),
              const cuda::Cuda& (*load_cuda)() = &cuda::load_cuda)
      : buffer(nbytes), backend(config, lib, choose_fakes(fabric, devices), load_cuda) {
    backend.attach(loop);
    keys = add_memory(0);
  }

  /// Registers the buffer as one more region.
  Bytes add_memory(RegionId region) {
    return backend.register_memory(region, range(), {}, backend.pin_memory(range(), {}));
  }
  [[nodiscard]] MemoryRange range() const { return {address(0), buffer.size()}; }
  [[nodiscard]] std::uint64_t address(std::size_t offset) const {
    return reinterpret_cast<std::uint64_t>(buffer.data()) + offset;
  }
  /// From `offset` here to `target_offset` there.
  [[nodiscard]] WriteSlice slice(std::size_t offset, const BackendNode& target,
                                 std::size_t target_offset, std::size_t nbytes) const {
    return {.local_address = address(offset),
            .remote_address = target.address(target_offset),
            .nbytes = nbytes};
  }
  /// Of both buffers' first n * nbytes bytes, backwards there: no two neighbours are contiguous.
  [[nodiscard]] std::vector<WriteSlice> backward_slices(const BackendNode& target, std::size_t n,
                                                        std::size_t nbytes) const {
    std::vector<WriteSlice> slices;
    for (std::size_t i = 0; i < n; ++i) {
      slices.push_back(slice(i * nbytes, target, (n - 1 - i) * nbytes, nbytes));
    }
    return slices;
  }

  /// One turn of a progress thread. @return whether anything was reported.
  bool turn() {
    std::unique_lock turn(turn_);
    loop.run_once(std::chrono::milliseconds(0), turn);
    std::vector<Completion> completions;
    const bool moved = backend.progress(completions);
    for (Completion& completion : completions) note(completion);
    return moved;
  }
  [[nodiscard]] std::uint64_t count(const std::string& name) const {
    Stats stats;
    backend.add_stats(stats);
    return std::get<std::uint64_t>(stats.at(name));
  }

  EventLoop loop;
  std::vector<unsigned char> buffer;
  VerbsBackend backend;
  Bytes keys;  ///< Of the buffer, for peers.
  std::map<PeerId, Seen> seen;

 private:
  Turn turn_;

  void note(Completion& completion) {
    Seen& peer = seen[completion.peer];
    switch (completion.kind) {
      case Completion::Kind::kWritesLanded:
        peer.landed[completion.transfer] += completion.slices;
        return;
      case Completion::Kind::kImm:
        return peer.imms.push_back(completion.imm);
      case Completion::Kind::kReachable:
        peer.reachable = true;
        return;
      case Completion::Kind::kPeerError:
        return peer.errors.push_back(std::move(completion.reason));
    }
  }
};

/// Turns the nodes until `condition` holds. @return false when patience ends first.
inline bool turn_until(const std::vector<BackendNode*>& nodes,
                       const std::function<bool()>& condition,
                       std::chrono::milliseconds patience = std::chrono::seconds(20)) {
  const auto deadline = Clock::now() + patience;
  while (!condition()) {
    if (Clock::now() > deadline) return false;
    bool moved = false;
    for (BackendNode* node : nodes) moved |= node->turn();
    if (!moved) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

inline PeerLink link_to(const BackendNode& node, Bytes endpoint) {
  PeerLink link;
  link.blob = std::move(endpoint);
  link.memory.push_back({node.range(), node.keys});
  return link;
}

/// Each becomes the other's peer `id`.
inline void connect_nodes(BackendNode& a, BackendNode& b, PeerId id = 1) {
  const Bytes endpoint_a = a.backend.create_endpoint(id);
  const Bytes endpoint_b = b.backend.create_endpoint(id);
  a.backend.connect(id, link_to(b, endpoint_b));
  b.backend.connect(id, link_to(a, endpoint_a));
}

/// Two nodes on devices of their own that are each other's peer 1.
struct NodePair {
  explicit NodePair(const EngineConfig& config = {}, const FakeOptions& options = {},
                    const FakeDeviceOptions& device = {}, std::size_t rails_a = 1,
                    std::size_t rails_b = 1)
      : fabric(fake_fabric(rails_a + rails_b, options, device)),
        a(fabric, names(0, rails_a), config),
        b(fabric, names(rails_a, rails_b), config) {
    connect_nodes(a, b);
  }
  [[nodiscard]] bool turn_until(const std::function<bool()>& condition) {
    return verbs::turn_until({&a, &b}, condition);
  }
  /// Posts all of it, however often the queues are full.
  void write(TransferId transfer, std::span<const WriteSlice> slices) {
    EXPECT_TRUE(turn_until([&] {
      slices = slices.subspan(a.backend.post_writes(1, transfer, slices, {}).slices);
      return slices.empty();
    }));
  }
  [[nodiscard]] std::string error_at(BackendNode& node) {
    EXPECT_TRUE(turn_until([&] { return !node.seen[1].errors.empty(); }));
    return node.seen[1].errors.empty() ? "" : node.seen[1].errors.front();
  }

  static std::vector<std::string> names(std::size_t first, std::size_t n) {
    std::vector<std::string> names;
    for (std::size_t i = first; i < first + n; ++i) names.push_back("rxe" + std::to_string(i));
    return names;
  }

  CleanFabric fabric;
  BackendNode a;
  BackendNode b;
};

/// Says which words are missing from a text for people.
inline testing::AssertionResult has_words(const std::string& text,
                                          const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    if (text.find(word) != std::string::npos) continue;
    return testing::AssertionFailure() << "no '" << word << "' in: " << text;
  }
  return testing::AssertionSuccess();
}

}  // namespace rkv::verbs
