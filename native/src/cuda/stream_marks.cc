// SPDX-License-Identifier: Apache-2.0
#include "cuda/stream_marks.h"

#include <algorithm>
#include <stdexcept>

namespace rkv::cuda {

void StreamMarks::open() {
  if (!gpu_) gpu_ = current_gpu();
  const Cuda& cuda = gpu_->cuda();
  if (gpu_->attribute(kCanUseStreamMemOps64) == 0) {
    throw std::runtime_error(gpu_->text() + " has no 64-bit stream memory operations");
  }
  const Current current(cuda, gpu_->context());
  void* words = nullptr;
  check(cuda,
        cuda.mem_host_alloc(&words, kStreams * sizeof(std::uint64_t),
                            kHostAllocPortable | kHostAllocMapped),
        "cuMemHostAlloc()");
  words_ = static_cast<std::uint64_t*>(words);
  std::fill_n(words_, kStreams, 0);
  check(cuda, cuda.mem_host_get_device_pointer(&device_words_, words, 0),
        "cuMemHostGetDevicePointer()");
}

Mark StreamMarks::mark(std::uintptr_t stream) {
  const std::lock_guard lock(mutex_);
  if (words_ == nullptr) open();
  const Cuda& cuda = gpu_->cuda();
  const auto [found, is_new] = number_of_.try_emplace(stream, number_of_.size());
  const std::size_t number = found->second;
  if (number >= kStreams) {
    number_of_.erase(found);
    throw std::runtime_error("mark(): more than " + std::to_string(kStreams) + " streams");
  }
  const Current current(cuda, gpu_->context());
  const std::uint64_t count = counts_[number] + 1;
  check(cuda,
        cuda.stream_write_value64(reinterpret_cast<Stream>(stream),
                                  device_words_ + number * sizeof(std::uint64_t), count, 0),
        "cuStreamWriteValue64()");
  counts_[number] = count;
  return (static_cast<Mark>(number) << kCountBits) | count;
}

bool StreamMarks::reached(Mark mark) const {
  if (mark == 0) return true;
  constexpr Mark kCountMask = (Mark{1} << kCountBits) - 1;
  const std::atomic_ref<std::uint64_t> word(words_[mark >> kCountBits]);
  return word.load(std::memory_order_acquire) >= (mark & kCountMask);
}

}  // namespace rkv::cuda
