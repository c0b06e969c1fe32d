// SPDX-License-Identifier: Apache-2.0
/// Two engines in one process over loopback, so that the sanitizers see both sides.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "core/engine.h"

namespace rkv {

/// What the engines of one test meet on.
class Network {
 public:
  Network() = default;
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;
  virtual ~Network() = default;

  /// The backend of engine 0 or 1.
  [[nodiscard]] virtual std::unique_ptr<Backend> create_backend(std::size_t engine,
                                                                const EngineConfig& config) = 0;
  /// Fails the test if the engines, which are gone, left anything behind.
  virtual void expect_clean() const {}
};

/// A row of the test matrix.
struct EngineParam {
  std::string name;
  EngineConfig config;
  std::function<std::unique_ptr<Network>()> create_network;
};

inline std::ostream& operator<<(std::ostream& out, const EngineParam& param) {
  return out << param.name;
}
inline std::string name_of(const testing::TestParamInfo<EngineParam>& info) {
  return info.param.name;
}

/// RKV_TEST_PATIENCE multiplies it on slow machines.
inline std::chrono::seconds engine_patience() {
  const char* factor = std::getenv("RKV_TEST_PATIENCE");
  return std::chrono::seconds(20) * (factor == nullptr ? 1 : std::max(1, std::atoi(factor)));
}

/// One engine with a registered buffer and an endpoint for one peer.
struct Side {
  Side(std::uint64_t incarnation, const EngineConfig& config, Network& network, std::size_t nbytes)
      : buffer(nbytes),
        engine(config, incarnation, network.create_backend(incarnation - 1, config)),
        memory(engine.register_memory({address(0), nbytes})),
        endpoint(engine.create_endpoint("peer-of-" + std::to_string(incarnation))) {}

  [[nodiscard]] std::uint64_t address(std::size_t offset) const {
    return reinterpret_cast<std::uint64_t>(buffer.data()) + offset;
  }
  void connect(const Side& other) {
    engine.connect(endpoint.peer, other.endpoint.descriptor, {other.memory.descriptor});
  }
  /// Takes events until one of `kind` arrives, counting all.
  Event expect(EventKind kind) {
    const auto deadline = Clock::now() + engine_patience();
    while (Clock::now() < deadline) {
      if (backlog_.empty() && engine.wait(std::chrono::milliseconds(100))) {
        for (Event& event : engine.poll(64)) backlog_.push_back(std::move(event));
      }
      while (!backlog_.empty()) {
        Event event = std::move(backlog_.front());
        backlog_.pop_front();
        ++seen[event.kind];
        if (event.kind == kind) return event;
      }
    }
    ADD_FAILURE() << "no event of kind " << static_cast<int>(kind);
    return {};
  }

  std::vector<unsigned char> buffer;  // before the engine, which writes into it until it is gone
  Engine engine;
  RegisteredMemory memory;
  CreatedEndpoint endpoint;
  std::map<EventKind, int> seen;

 private:
  std::deque<Event> backlog_;
};

inline void connect_both(Side& a, Side& b) {
  a.connect(b);
  b.connect(a);
  a.expect(EventKind::kConnected);
  b.expect(EventKind::kConnected);
}

/// The columns of Engine::write().
struct Columns {
  std::vector<std::int64_t> local;
  std::vector<std::int64_t> remote;
  std::vector<std::int64_t> nbytes;

  TransferId write(Side& from, std::optional<std::uint32_t> imm = {}) const {
    return from.engine.write(from.endpoint.peer, local, remote, nbytes, imm);
  }
};

/// Every page of `from` to a random other page of `to`.
Columns scattered_pages(const Side& from, const Side& to, std::size_t page,
                        std::mt19937_64& random);
void expect_landed(const Columns& rows);
void fill_random(std::vector<unsigned char>& buffer, std::mt19937_64& random);

/// The suite that every backend passes.
class EngineTest : public testing::TestWithParam<EngineParam> {
 protected:
  void TearDown() override { network_->expect_clean(); }
  [[nodiscard]] Side make_side(std::uint64_t incarnation, std::size_t nbytes) {
    return {incarnation, GetParam().config, *network_, nbytes};
  }

  std::unique_ptr<Network> network_ = GetParam().create_network();
};

}  // namespace rkv
