// SPDX-License-Identifier: Apache-2.0
#include "cuda/copier.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/copy_kernel.h"

namespace rkv::cuda {

CopyKernel::CopyKernel(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {
  const Cuda& cuda = gpu_->cuda();
  const Current current(cuda, gpu_->context());
  check(cuda, cuda.module_load_data(&module_, kCopyPtx), "cuModuleLoadData(copy kernel)",
        "the GPU must be of the Volta generation or newer");
  check(cuda, cuda.module_get_function(&function_, module_, "rkv_copy"), "cuModuleGetFunction()");
}

CopyKernel::~CopyKernel() {
  const Current current(gpu_->cuda(), gpu_->context());
  gpu_->cuda().module_unload(module_);
}

Stream create_stream(const Gpu& gpu) {
  const Cuda& cuda = gpu.cuda();
  const Current current(cuda, gpu.context());
  int least = 0;
  int greatest = 0;
  check(cuda, cuda.ctx_get_stream_priority_range(&least, &greatest),
        "cuCtxGetStreamPriorityRange()");
  Stream stream = nullptr;
  check(cuda, cuda.stream_create_with_priority(&stream, kStreamNonBlocking, greatest),
        "cuStreamCreateWithPriority()");
  return stream;
}

Copier::Copier(std::shared_ptr<const CopyKernel> kernel, StreamMarks& marks, DevicePtr peer_gate)
    : kernel_(std::move(kernel)),
      marks_(marks),
      peer_gate_(peer_gate),
      stream_(create_stream(kernel_->gpu())) {
  const Cuda& cuda = kernel_->gpu().cuda();
  const Current current(cuda, kernel_->gpu().context());
  void* rows = nullptr;
  check(cuda,
        cuda.mem_host_alloc(&rows, (kMaxRows + 1) * sizeof(CopyRow),
                            kHostAllocPortable | kHostAllocMapped),
        "cuMemHostAlloc()");
  rows_ = static_cast<CopyRow*>(rows);
  std::fill_n(rows_, kMaxRows + 1, CopyRow{});
  check(cuda, cuda.mem_host_get_device_pointer(&device_rows_, rows, 0),
        "cuMemHostGetDevicePointer()");
}

Copier::~Copier() {
  drain();
  const Cuda& cuda = kernel_->gpu().cuda();
  const Current current(cuda, kernel_->gpu().context());
  cuda.stream_destroy(stream_);
  cuda.mem_free_host(rows_);
}

Copier::Launched Copier::launch(std::span<const CopyRow> rows) {
  const Cuda& cuda = kernel_->gpu().cuda();
  const std::size_t first = end_ % kMaxRows;
  const std::size_t n = std::min({rows.size(), room(), kRowsPerLaunch, kMaxRows - first});
  if (n == 0) return {};
  std::uint64_t longest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    rows_[first + i] = rows[i];
    longest = std::max(longest, rows[i].nbytes);
  }
  DevicePtr device_rows = device_rows_ + first * sizeof(CopyRow);
  DevicePtr peer_gate = peer_gate_;
  DevicePtr refused = device_rows_ + kMaxRows * sizeof(CopyRow);
  std::array<void*, 3> parameters = {&device_rows, &peer_gate, &refused};
  const auto pieces = static_cast<unsigned>((longest + kPieceBytes - 1) / kPieceBytes);
  const Current current(cuda, kernel_->gpu().context());
  check(cuda,
        cuda.launch_kernel(kernel_->function(), static_cast<unsigned>(n), std::max(pieces, 1U), 1,
                           kCopyThreads, 1, 1, 0, stream_, parameters.data(), nullptr),
        "cuLaunchKernel(rkv_copy)");
  end_ += n;
  return {n, marks_.mark(reinterpret_cast<std::uintptr_t>(stream_))};
}

void Copier::drain() noexcept {
  const Current current(kernel_->gpu().cuda(), kernel_->gpu().context());
  kernel_->gpu().cuda().stream_synchronize(stream_);
}

bool Copier::was_refused() const {
  const std::atomic_ref<std::uint64_t> refused(rows_[kMaxRows].from);
  return refused.load(std::memory_order_acquire) != 0;
}

std::string Copier::error() const {
  constexpr Result kNotReady = 600;
  const Cuda& cuda = kernel_->gpu().cuda();
  const Current current(cuda, kernel_->gpu().context());
  const Result result = cuda.stream_query(stream_);
  return result == kSuccess || result == kNotReady ? "" : result_text(cuda, result);
}

}  // namespace rkv::cuda
