// SPDX-License-Identifier: Apache-2.0
/// What a descriptor costs on its way to the NIC, with no NIC in the way: WRs go to a provider that
/// completes them at once and moves nothing. One thread, the engine's own steps in their order.
///
/// Prints one JSON object per case: {"rows": 1024, "pattern": "fragmented", "prepare_ns": ...}.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../tests/fake_rdma.h"
#include "core/regions.h"
#include "core/rows.h"
#include "core/slice_pool.h"
#include "core/transfer_queue.h"
#include "verbs/verbs_backend.h"

namespace {

using rkv::Clock;

constexpr std::uint64_t kPageBytes = 4096;
constexpr std::array<std::size_t, 7> kRows{1, 16, 128, 1024, 4096, 16384, 65536};
constexpr std::size_t kMaxRows = kRows.back();
constexpr std::uint64_t kLocalBase = std::uint64_t{1} << 40;  // never touched, so never mapped
constexpr std::uint64_t kRemoteBase = std::uint64_t{2} << 40;
constexpr rkv::MemoryRange kLocal{kLocalBase, 2 * kMaxRows * kPageBytes};
constexpr rkv::MemoryRange kRemote{kRemoteBase, 2 * kMaxRows * kPageBytes};
constexpr std::chrono::milliseconds kPerCase{300};

struct Columns {
  std::vector<std::int64_t> local;
  std::vector<std::int64_t> remote;
  std::vector<std::int64_t> nbytes;
};

/// fragmented: no two rows touch, on either side. gathered: targets are contiguous, sources are
/// not. contiguous: both are.
Columns make_rows(std::size_t n, const std::string& pattern) {
  std::vector<std::int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::vector<std::int64_t> other = order;
  std::mt19937 random(1);
  if (pattern != "contiguous") std::shuffle(order.begin(), order.end(), random);
  if (pattern == "fragmented") std::shuffle(other.begin(), other.end(), random);
  const std::int64_t stride = pattern == "fragmented" ? 2 : 1;
  Columns rows;
  for (std::size_t i = 0; i < n; ++i) {
    rows.local.push_back(static_cast<std::int64_t>(kLocalBase) +
                         order[i] * (pattern == "contiguous" ? 1 : 2) *
                             static_cast<std::int64_t>(kPageBytes));
    rows.remote.push_back(static_cast<std::int64_t>(kRemoteBase) +
                          other[i] * stride * static_cast<std::int64_t>(kPageBytes));
    rows.nbytes.push_back(kPageBytes);
  }
  return rows;
}

rkv::verbs::Choice fake_choice() {
  rkv::verbs::ChosenPort chosen;
  chosen.port.device = "rxe0";
  chosen.port.link_layer = rkv::verbs::LinkLayer::kEthernet;
  return {.ports = {chosen}};
}

/// Two backends on one null fabric, connected; only the first one posts.
class Pair {
 public:
  Pair()
      : fabric_({.delivery = rkv::verbs::FakeDelivery::kNull}),
        near_(config(), fabric_.table(), fake_choice()),
        far_(config(), fabric_.table(), fake_choice()) {
    near_.attach(loop_);
    far_.attach(loop_);
    const rkv::MemoryUse use;
    near_.register_memory(0, kLocal, use, near_.pin_memory(kLocal, use));
    const rkv::Bytes remote = far_.register_memory(0, kRemote, use, far_.pin_memory(kRemote, use));
    const rkv::Bytes near_blob = near_.create_endpoint(1);
    const rkv::Bytes far_blob = far_.create_endpoint(1);
    near_.connect(1, {.blob = far_blob, .memory = {{kRemote, remote}}, .sockets = {}});
  }

  /// Posts everything, as the progress thread does. @return the completions.
  std::size_t transfer(rkv::Slices slices) {
    const rkv::NoMarks no_marks;
    rkv::TransferQueue queue(1, static_cast<std::size_t>(config().queue_depth), no_marks);
    queue.add_write(1, std::move(slices));
    std::size_t done = 0;
    while (queue.outstanding() > 0) {
      queue.post(near_);
      completions_.clear();
      near_.progress(completions_);
      for (const rkv::Completion& completion : completions_) {
        if (completion.kind != rkv::Completion::Kind::kWritesLanded) continue;
        queue.landed(completion.transfer, completion.slices);
        ++done;
      }
    }
    return done;
  }

 private:
  static rkv::EngineConfig config() { return {.backend = "verbs"}; }

  rkv::verbs::FakeFabric fabric_;
  rkv::EventLoop loop_;
  rkv::verbs::VerbsBackend near_;
  rkv::verbs::VerbsBackend far_;
  std::vector<rkv::Completion> completions_;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

void measure(Pair& pair, std::size_t n, const std::string& pattern) {
  const Columns rows = make_rows(n, pattern);
  const rkv::RegionIndex local({{0, kLocal}});
  const rkv::RegionIndex remote({{0, kRemote}});
  const auto pool = std::make_shared<rkv::SlicePool>();
  const auto block_size = static_cast<std::uint64_t>(rkv::EngineConfig{}.block_size);
  std::vector<double> prepare;
  std::vector<double> post;
  const Clock::time_point end = Clock::now() + kPerCase;
  while (Clock::now() < end || post.size() < 5) {
    const Clock::time_point start = Clock::now();
    rkv::Slices slices = pool->take();
    rkv::slice_rows({rows.local, rows.remote, rows.nbytes}, local, remote, block_size, *slices);
    const Clock::time_point prepared = Clock::now();
    pair.transfer(std::move(slices));
    const Clock::time_point posted = Clock::now();
    using Nanoseconds = std::chrono::duration<double, std::nano>;
    prepare.push_back(Nanoseconds(prepared - start).count() / static_cast<double>(n));
    post.push_back(Nanoseconds(posted - prepared).count() / static_cast<double>(n));
  }
  std::printf(
      "{\"rows\": %zu, \"pattern\": \"%s\", \"prepare_ns\": %.2f, \"post_ns\": %.2f, "
      "\"repeats\": %zu}\n",
      n, pattern.c_str(), median(prepare), median(post), post.size());
  std::fflush(stdout);
}

}  // namespace

int main() {
  Pair pair;
  for (const char* pattern : {"fragmented", "gathered", "contiguous"}) {
    for (std::size_t n : kRows) measure(pair, n, pattern);
  }
}
