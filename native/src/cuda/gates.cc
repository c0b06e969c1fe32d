// SPDX-License-Identifier: Apache-2.0
#include "cuda/gates.h"

#include <stdexcept>

#include "cuda/copier.h"

namespace rkv::cuda {

Gates::Gates(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)), stream_(create_stream(*gpu_)) {
  const Cuda& cuda = gpu_->cuda();
  const Current current(cuda, gpu_->context());
  check(cuda, cuda.mem_alloc(&base_, kBytes), "cuMemAlloc()",
        "leave the engine a few MiB: lower gpu_memory_utilization");
  check(cuda, cuda.memset_d32_async(base_, 0, kBytes / 4, stream_), "cuMemsetD32Async()");
  check(cuda, cuda.stream_synchronize(stream_), "cuStreamSynchronize()");
}

Gates::~Gates() {
  const Cuda& cuda = gpu_->cuda();
  const Current current(cuda, gpu_->context());
  cuda.mem_free(base_);
  cuda.stream_destroy(stream_);
}

Gates::Slot Gates::open() {
  if (next_ == kSlots) {
    throw std::runtime_error("more than " + std::to_string(kSlots) +
                             " peers and regions; restart the engine");
  }
  return next_++;
}

void Gates::close(Slot slot) {
  const Cuda& cuda = gpu_->cuda();
  const Current current(cuda, gpu_->context());
  check(cuda, cuda.memset_d32_async(base_ + offset(slot), 1, 1, stream_), "cuMemsetD32Async()");
  check(cuda, cuda.stream_synchronize(stream_), "cuStreamSynchronize()");
}

bool Gates::wait_until_idle(Slot slot, std::chrono::milliseconds timeout) {
  const Cuda& cuda = gpu_->cuda();
  const Current current(cuda, gpu_->context());
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  do {
    std::uint32_t active = 0;
    check(cuda, cuda.memcpy_dtoh_async(&active, base_ + offset(slot) + 4, sizeof active, stream_),
          "cuMemcpyDtoHAsync()");
    check(cuda, cuda.stream_synchronize(stream_), "cuStreamSynchronize()");
    if (active == 0) return true;
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace rkv::cuda
