// SPDX-License-Identifier: Apache-2.0
#include "cuda/read.h"

#include <algorithm>

#include "core/checksum.h"
#include "cuda/copier.h"

namespace rkv::cuda {
namespace {

/// A pinned buffer and a stream on one GPU; calls come from few threads, each with its own.
class Reader {
 public:
  explicit Reader(int device)
      : device_(device),
        gpu_(std::make_shared<const Gpu>(load_cuda(), device)),
        stream_(create_stream(*gpu_)) {}
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() {
    const Current current(gpu_->cuda(), gpu_->context());
    gpu_->cuda().mem_free_host(buffer_);
    gpu_->cuda().stream_destroy(stream_);
  }

  /// Copies the ranges that fit the buffer, at least one. @return how many.
  std::size_t read(std::span<const std::int64_t> addresses, std::span<const std::int64_t> nbytes) {
    const Cuda& cuda = gpu_->cuda();
    const Current current(cuda, gpu_->context());
    reserve(static_cast<std::size_t>(nbytes[0]));
    std::size_t used = 0;
    std::size_t n = 0;
    for (; n < nbytes.size(); ++n) {
      const auto length = static_cast<std::size_t>(nbytes[n]);
      if (used + length > capacity_) break;
      if (length == 0) continue;
      check(cuda,
            cuda.memcpy_dtoh_async(buffer() + used, static_cast<DevicePtr>(addresses[n]), length,
                                   stream_),
            "cuMemcpyDtoHAsync(" + std::to_string(addresses[n]) + ")");
      used += length;
    }
    check(cuda, cuda.stream_synchronize(stream_), "cuStreamSynchronize()");
    return n;
  }
  [[nodiscard]] int device() const { return device_; }
  [[nodiscard]] char* buffer() const { return static_cast<char*>(buffer_); }

 private:
  void reserve(std::size_t nbytes) {
    constexpr std::size_t kAtLeast = 16 << 20;
    if (nbytes <= capacity_) return;
    gpu_->cuda().mem_free_host(buffer_);
    buffer_ = nullptr;
    capacity_ = 0;
    const std::size_t wanted = std::max(nbytes, kAtLeast);
    check(gpu_->cuda(), gpu_->cuda().mem_host_alloc(&buffer_, wanted, kHostAllocPortable),
          "cuMemHostAlloc()");
    capacity_ = wanted;
  }

  const int device_;
  const std::shared_ptr<const Gpu> gpu_;
  Stream stream_;
  void* buffer_ = nullptr;
  std::size_t capacity_ = 0;
};

}  // namespace

std::vector<std::uint64_t> checksum(std::span<const std::int64_t> addresses,
                                    std::span<const std::int64_t> nbytes) {
  std::vector<std::uint64_t> sums;
  sums.reserve(nbytes.size());
  if (nbytes.empty()) return sums;
  static thread_local std::unique_ptr<Reader> reader;
  const int device = device_of(load_cuda(), static_cast<DevicePtr>(addresses.front()));
  if (!reader || reader->device() != device) reader = std::make_unique<Reader>(device);
  while (sums.size() < nbytes.size()) {
    const auto lengths = nbytes.subspan(sums.size());
    const std::size_t n = reader->read(addresses.subspan(sums.size()), lengths);
    const char* data = reader->buffer();
    for (std::size_t i = 0; i < n; ++i) {
      sums.push_back(checksum64(data, static_cast<std::size_t>(lengths[i])));
      data += lengths[i];
    }
  }
  return sums;
}

}  // namespace rkv::cuda
