// SPDX-License-Identifier: Apache-2.0
#include "cuda/visibility.h"

#include <stdexcept>

namespace rkv::cuda {
namespace {

constexpr int kFlushByHost = 1;        ///< CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST
constexpr int kOrderedForOwner = 100;  ///< CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
constexpr int kCurrentContext = 0;     ///< CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX
constexpr int kToOwner = 100;          ///< CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER

int read_attribute(const Gpu& gpu, DeviceAttribute attribute) {
  int value = 0;
  const Result result = gpu.cuda().device_get_attribute(&value, attribute, gpu.device());
  return result == kSuccess ? value : 0;
}

}  // namespace

RdmaAttributes read_rdma_attributes(const Gpu& gpu) {
  const bool can_flush = gpu.cuda().flush_gpu_direct_rdma_writes != nullptr;
  return {.supported = read_attribute(gpu, kGpuDirectRdmaSupported) != 0 ||
                       read_attribute(gpu, kDmaBufSupported) != 0,
          .flush_options = can_flush ? read_attribute(gpu, kGpuDirectRdmaFlushWritesOptions) : 0,
          .ordering = read_attribute(gpu, kGpuDirectRdmaWritesOrdering)};
}

bool needs_flush(const RdmaAttributes& attributes, const std::string& gpu) {
  if (attributes.ordering >= kOrderedForOwner) return false;
  if ((attributes.flush_options & kFlushByHost) != 0) return true;
  throw std::runtime_error(
      gpu + " neither orders the writes of NICs (CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_" +
      "ORDERING is " + std::to_string(attributes.ordering) +
      ") nor lets the host flush them (…_FLUSH_WRITES_OPTIONS is " +
      std::to_string(attributes.flush_options) +
      "), so what peers write could be read too early; install a newer NVIDIA driver");
}

void flush_remote_writes(const Gpu& gpu) {
  const Current current(gpu.cuda(), gpu.context());
  check(gpu.cuda(), gpu.cuda().flush_gpu_direct_rdma_writes(kCurrentContext, kToOwner),
        "cuFlushGPUDirectRDMAWrites()", "the GPU or its context is broken; see the kernel log");
}

void make_copies_synchronous(const Gpu& gpu, DevicePtr address) {
  const Current current(gpu.cuda(), gpu.context());
  const unsigned on = 1;
  // Not of memory from cuMemMap(), which refuses it; nothing that the engine promises needs it.
  (void)gpu.cuda().pointer_set_attribute(&on, kPointerSyncMemops, address);
}

}  // namespace rkv::cuda
