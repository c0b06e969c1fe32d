// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/mman.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "backends/backends.h"
#include "core/engine.h"
#include "core/unique_fd.h"

namespace rkv::bench {

constexpr std::size_t kRegionBytes = std::size_t{256} << 20;
constexpr std::chrono::seconds kPatience{300};  // 4 GiB at Soft-RoCE's slowest in an emulated guest

[[noreturn]] inline void fail(const char* call) {
  throw std::system_error(errno, std::generic_category(), call);
}

/// Shared by both processes, at the same address.
struct Region {
  Region()
      : data(static_cast<unsigned char*>(mmap(nullptr, kRegionBytes, PROT_READ | PROT_WRITE,
                                              MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    if (data == MAP_FAILED) fail("mmap");
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() { munmap(data, kRegionBytes); }

  [[nodiscard]] std::int64_t address(std::size_t offset) const {
    return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data) + offset);
  }
  [[nodiscard]] MemoryRange range() const {
    return {static_cast<std::uint64_t>(address(0)), kRegionBytes};
  }

  unsigned char* data;
};

/// To the other process.
class Pipe {
 public:
  explicit Pipe(int fd) : fd_(fd) {}

  void send(const Bytes& message) {
    if (::send(fd_.get(), message.data(), message.size(), MSG_NOSIGNAL) < 0) fail("send");
  }
  /// Empty when the other process has closed its end.
  [[nodiscard]] Bytes receive() {
    Bytes message(std::size_t{1} << 16, '\0');
    const ssize_t n = ::recv(fd_.get(), message.data(), message.size(), 0);
    if (n < 0) fail("recv");
    message.resize(static_cast<std::size_t>(n));
    return message;
  }

 private:
  UniqueFd fd_;
};

/// One process's engine, connected to the other's.
class End {
 public:
  End(std::uint64_t incarnation, const EngineConfig& config, const Region& own, Pipe& pipe)
      : engine(config, incarnation, create_backend(config)),
        memory_(engine.register_memory(own.range())),
        endpoint_(engine.create_endpoint("bench")) {
    pipe.send(endpoint_.descriptor);
    pipe.send(memory_.descriptor);
    const Bytes descriptor = pipe.receive();
    engine.connect(endpoint_.peer, descriptor, {pipe.receive()});
    (void)expect(EventKind::kConnected);
  }

  [[nodiscard]] PeerId peer() const { return endpoint_.peer; }

  /// The next event of `kind`; others are dropped.
  [[nodiscard]] Event expect(EventKind kind) {
    const Clock::time_point deadline = Clock::now() + kPatience;
    while (Clock::now() < deadline) {
      if (!engine.wait(std::chrono::seconds(1))) continue;
      for (Event& event : engine.poll(1)) {
        if (event.kind == EventKind::kTransferDone) posted_ns.push_back(event.posted_ns);
        if (event.kind == kind) return std::move(event);
        if (!event.reason.empty()) throw std::runtime_error(event.reason);
      }
    }
    throw std::runtime_error("no event of kind " + std::to_string(static_cast<int>(kind)));
  }

  void write_block(const Region& from, const Region& to, std::int64_t block, std::uint32_t imm) {
    const std::array local{from.address(0)};
    const std::array remote{to.address(0)};
    const std::array nbytes{block};
    (void)engine.write(peer(), local, remote, nbytes, imm);
  }

  Engine engine;
  std::vector<std::int64_t> posted_ns;  ///< Of all transfers that are done.

 private:
  RegisteredMemory memory_;
  CreatedEndpoint endpoint_;
};

}  // namespace rkv::bench
