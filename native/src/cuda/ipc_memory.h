// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/regions.h"
#include "core/types.h"
#include "core/unique_fd.h"
#include "core/wire.h"
#include "cuda/device.h"

namespace rkv::cuda {

/// Who exports: the machine as booted, the process, the GPU. All that decides whether a peer can
/// map its memory.
struct Exporter {
  std::array<std::uint64_t, 2> boot_id{};
  std::uint64_t process = 0;  ///< Random.
  std::uint32_t pid = 0;      ///< As seen in its own namespace.
  Uuid gpu{};

  static Exporter here(const Gpu& gpu);
  void put(ByteWriter& writer) const;
  static Exporter get(ByteReader& reader);
};

/// How a peer's memory can be reached from here, in words.
struct Reach {
  bool possible = false;
  std::string text;  ///< "same GPU", "GPU 0 to GPU 1, peer to peer"; else why not and what to do.
};
[[nodiscard]] Reach reach(const Gpu& gpu, const Exporter& here, const Exporter& peer);

/// Memory made mappable for other processes. Keeps open what the mapping needs.
struct Export {
  Bytes blob;
  std::vector<UniqueFd> fds;
};
/// Memory of cudaMalloc() and PyTorch's caching allocator goes by one CUDA IPC handle; memory
/// mapped by the virtual memory functions (expandable segments) piece by piece as file descriptors.
/// @throw std::runtime_error with call, error and remedy.
[[nodiscard]] Export export_memory(const Gpu& gpu, const MemoryRange& range);

/// A peer's memory, mapped here until destruction.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  virtual ~Mapping() = default;
};
struct Mapped {
  DevicePtr address = 0;  ///< Of the exported range.
  std::shared_ptr<Mapping> mapping;
};

/// Maps each allocation once, however many regions lie in it and however often it is asked for.
class Mapper {
 public:
  explicit Mapper(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

  /// @throw std::runtime_error, FormatError
  [[nodiscard]] Mapped map(const Exporter& peer, const Bytes& blob, std::uint64_t nbytes);

 private:
  const std::shared_ptr<const Gpu> gpu_;
  std::map<Bytes, std::weak_ptr<Mapping>> mappings_;
};

}  // namespace rkv::cuda
