// SPDX-License-Identifier: Apache-2.0
/// Two engines in two processes, driven by orders on stdin, one a line:
///
///   write BLOCK BATCH REPEATS  seconds from write() of a batch of scattered blocks to
///                              kTransferDone, one batch after the other
///   stream BLOCK BATCH REPEATS seconds of all these batches, with two of them queued at any time
///   gather BLOCK BATCH REPEATS the same with contiguous targets, so that a WR takes several blocks
///   pingpong BLOCK ROUNDS      half round trips of a block with its signal, p50 and p99, as the
///                              application sees them and as the engines do
///
/// Each is answered by a line of JSON, as is the start. Both regions are shared memory, so the
/// writing process sees for itself what landed: it compares after the first batch of each shape.
///
/// usage: rkv_verbs_bench [FIELD=VALUE]...   fields of EngineConfig, such as backend=verbs
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <tuple>

#include "bench_end.h"

namespace {

using rkv::Clock;
using rkv::EventKind;
using rkv::bench::End;
using rkv::bench::fail;
using rkv::bench::kRegionBytes;
using rkv::bench::Pipe;
using rkv::bench::Region;

constexpr double kPeerTimeoutS = 60;  // an emulated guest may stand still for seconds
constexpr std::size_t kWarmUpRounds = 20;

struct Rows {
  std::vector<std::int64_t> local = {};
  std::vector<std::int64_t> remote = {};
  std::vector<std::int64_t> nbytes = {};
  bool verified = false;
};

std::vector<std::size_t> shuffled(std::size_t n, std::mt19937& random) {
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

/// `batch` rows, no two neighbours of which can be coalesced. A batch larger than the region goes
/// over it again with the same pairs, so that it does not matter which of two rows lands last.
Rows scatter(const Region& from, const Region& to, std::size_t block, std::size_t batch,
             bool gather, std::mt19937& random) {
  const std::size_t slots = kRegionBytes / block;
  const std::vector<std::size_t> source = shuffled(slots, random);
  std::vector<std::size_t> target = shuffled(slots, random);
  if (gather) std::sort(target.begin(), target.end());
  Rows rows{.nbytes = std::vector(batch, static_cast<std::int64_t>(block))};
  for (std::size_t i = 0; i < batch; ++i) {
    const std::size_t at = i % slots;
    const std::size_t next = (i + 1) % slots;
    if (source[next] == source[at] + 1 && target[next] == target[at] + 1) {
      return scatter(from, to, block, batch, gather, random);
    }
    rows.local.push_back(from.address(source[at] * block));
    rows.remote.push_back(to.address(target[at] * block));
  }
  return rows;
}

void* at(std::int64_t address) { return reinterpret_cast<void*>(address); }

double percentile(std::vector<double>& values, std::size_t percent) {
  std::sort(values.begin(), values.end());
  return values.at(values.size() * percent / 100);
}

/// The process that reads orders.
class Writer {
 public:
  Writer(const rkv::EngineConfig& config, const Region& source, const Region& target, Pipe& pipe)
      : source_(source), target_(target), pipe_(pipe), end_(1, config, source, pipe) {
    std::printf("{\"backend\": \"%s\"}\n", std::string(end_.engine.backend()).c_str());
  }

  void obey(const std::string& line) {
    std::istringstream order(line);
    std::string verb;
    std::size_t block = 0;
    std::int64_t count = 0;
    std::int64_t repeats = 1;
    order >> verb >> block >> count;
    if (verb != "pingpong") order >> repeats;
    if (!order || block == 0 || block > kRegionBytes || count < 1) {
      throw std::invalid_argument("cannot read the order '" + line + "'");
    }
    if (verb == "write") return write(block, static_cast<std::size_t>(count), repeats);
    if (verb == "stream" || verb == "gather") {
      return stream(rows_of(block, static_cast<std::size_t>(count), verb == "gather"), repeats);
    }
    if (verb == "pingpong") return pingpong(static_cast<std::int64_t>(block), count);
    throw std::invalid_argument("no order '" + verb + "'");
  }

 private:
  void write(std::size_t block, std::size_t batch, std::int64_t repeats) {
    Rows& rows = rows_of(block, batch, false);
    const bool verify = !std::exchange(rows.verified, true);
    if (verify) {
      for (const std::int64_t row : rows.remote) std::memset(at(row), 0xff, block);
    }
    std::string seconds = std::to_string(transfer(rows));
    for (std::size_t i = 0; verify && i < batch; ++i) {
      if (std::memcmp(at(rows.local[i]), at(rows.remote[i]), block) != 0) {
        throw std::runtime_error("row " + std::to_string(i) + " differs");
      }
    }
    while (--repeats > 0) seconds += ", " + std::to_string(transfer(rows));
    std::printf("{\"seconds\": [%s], \"verified\": %s}\n", seconds.c_str(),
                verify ? "true" : "false");
  }

  void stream(const Rows& rows, std::int64_t repeats) {
    const Clock::time_point start = Clock::now();
    for (std::int64_t queued = 0; queued < std::min<std::int64_t>(repeats, 2); ++queued) {
      submit(rows);
    }
    for (std::int64_t done = 1; done <= repeats; ++done) {
      (void)end_.expect(EventKind::kTransferDone);
      if (done + 2 <= repeats) submit(rows);
    }
    std::printf("{\"seconds\": %.6f}\n",
                std::chrono::duration<double>(Clock::now() - start).count());
  }

  Rows& rows_of(std::size_t block, std::size_t batch, bool gather) {
    const auto [entry, is_new] = rows_.try_emplace({block, batch, gather});
    if (is_new) entry->second = scatter(source_, target_, block, batch, gather, random_);
    return entry->second;
  }

  rkv::TransferId submit(const Rows& rows) {
    return end_.engine.write(end_.peer(), rows.local, rows.remote, rows.nbytes);
  }

  /// Seconds of one batch.
  double transfer(const Rows& rows) {
    const Clock::time_point start = Clock::now();
    const rkv::TransferId id = submit(rows);
    while (end_.expect(EventKind::kTransferDone).id != id) continue;
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  void pingpong(std::int64_t block, std::int64_t rounds) {
    const std::int64_t all = rounds + static_cast<std::int64_t>(kWarmUpRounds);
    pipe_.send(std::to_string(block) + " " + std::to_string(all));
    end_.posted_ns.clear();
    std::vector<double> halves;
    for (std::int64_t i = 0; i < all; ++i) {
      const Clock::time_point start = Clock::now();
      end_.write_block(source_, target_, block, 1);
      (void)end_.expect(EventKind::kImm);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      if (i >= static_cast<std::int64_t>(kWarmUpRounds)) halves.push_back(took.count() / 2);
    }
    while (end_.posted_ns.size() < static_cast<std::size_t>(all)) {
      (void)end_.expect(EventKind::kTransferDone);
    }
    std::vector<double> engine_us = one_way_us(pipe_.receive());
    std::printf(
        "{\"p50_us\": %.3f, \"p99_us\": %.3f, \"engine_p50_us\": %.3f, \"engine_p99_us\": %.3f}\n",
        percentile(halves, 50), percentile(halves, 99), percentile(engine_us, 50),
        percentile(engine_us, 99));
  }

  /// From the last slice being posted here to the peer's engine reporting the signal; both clocks
  /// are this host's.
  [[nodiscard]] std::vector<double> one_way_us(const rkv::Bytes& answer) const {
    std::istringstream times(answer);
    std::vector<double> took;
    std::int64_t seen_ns = 0;
    for (std::size_t i = 0; times >> seen_ns; ++i) {
      if (i < kWarmUpRounds) continue;
      took.push_back(static_cast<double>(seen_ns - end_.posted_ns.at(i)) / 1e3);
    }
    return took;
  }

  const Region& source_;
  const Region& target_;
  Pipe& pipe_;
  End end_;
  std::mt19937 random_{1};
  std::map<std::tuple<std::size_t, std::size_t, bool>, Rows> rows_;
};

/// The other process: answers pings until its pipe closes.
void serve(const rkv::EngineConfig& config, const Region& source, const Region& target,
           Pipe& pipe) {
  End end(2, config, target, pipe);
  for (rkv::Bytes order = pipe.receive(); !order.empty(); order = pipe.receive()) {
    std::istringstream fields(order);
    std::int64_t block = 0;
    std::int64_t rounds = 0;
    fields >> block >> rounds;
    std::string seen_ns;
    for (; rounds > 0; --rounds) {
      seen_ns += std::to_string(end.expect(EventKind::kImm).time_ns) + " ";
      end.write_block(target, source, block, 1);
    }
    pipe.send(seen_ns);
  }
}

rkv::EngineConfig parse(int argc, char** argv) {
  using rkv::EngineConfig;
  const std::pair<std::string, std::int64_t EngineConfig::*> numbers[] = {
      {"block_size", &EngineConfig::block_size},     {"gid_index", &EngineConfig::gid_index},
      {"queue_depth", &EngineConfig::queue_depth},   {"qps_per_peer", &EngineConfig::qps_per_peer},
      {"progress_cpu", &EngineConfig::progress_cpu}, {"spin_us", &EngineConfig::spin_us}};
  const std::pair<std::string, std::string EngineConfig::*> texts[] = {
      {"backend", &EngineConfig::backend}, {"devices", &EngineConfig::devices}};
  EngineConfig config;
  config.backend = "verbs";
  config.peer_timeout_s = kPeerTimeoutS;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::string name = argument.substr(0, argument.find('='));
    const std::string value = argument.substr(std::min(name.size() + 1, argument.size()));
    bool known = false;
    for (const auto& [field, member] : numbers) {
      if (field == name) config.*member = std::stoll(value), known = true;
    }
    for (const auto& [field, member] : texts) {
      if (field == name) config.*member = value, known = true;
    }
    if (!known) throw std::invalid_argument("no field '" + name + "'");
  }
  config.validate();
  return config;
}

int run(int argc, char** argv) {
  rkv::EngineConfig config = parse(argc, argv);
  const Region source;
  const Region target;
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) != 0) fail("socketpair");
  const pid_t child = fork();  // before there are threads
  if (child < 0) fail("fork");
  Pipe pipe(fds[child == 0 ? 1 : 0]);
  close(fds[child == 0 ? 0 : 1]);
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    serve(config, source, target, pipe);
    return 0;
  }
  std::mt19937_64 random(2);
  for (std::size_t i = 0; i < kRegionBytes; i += sizeof(std::uint64_t)) {
    const std::uint64_t word = random();
    std::memcpy(source.data + i, &word, sizeof word);
  }
  std::memset(target.data, 0xff, kRegionBytes);  // every page must be there
  Writer writer(config, source, target, pipe);
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line); std::fflush(stdout)) writer.obey(line);
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  return run(argc, argv);
} catch (const std::exception& error) {
  std::fprintf(stderr, "rkv_verbs_bench: %s\n", error.what());
  return 1;
}
