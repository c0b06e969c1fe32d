// SPDX-License-Identifier: Apache-2.0
/// What GPUDirect RDMA asks of the owner of GPU memory.
///
/// A completion says that a NIC has sent its writes towards the GPU; the completion itself goes to
/// host memory, by another way. Work that the CPU submits after it is behind the writes on every
/// GPU whose platform orders them by itself. On others they have to be flushed first.
#pragma once

#include <string>

#include "cuda/device.h"

namespace rkv::cuda {

/// Attributes of a device; 0 where its driver does not know them.
struct RdmaAttributes {
  bool supported = false;  ///< GPU_DIRECT_RDMA_SUPPORTED or DMA_BUF_SUPPORTED
  int flush_options = 0;   ///< GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS, bits
  int ordering = 0;        ///< GPU_DIRECT_RDMA_WRITES_ORDERING
};

[[nodiscard]] RdmaAttributes read_rdma_attributes(const Gpu& gpu);

/// Whether writes of NICs must be flushed before kernels of this GPU may read them.
/// @throw std::runtime_error when they must and cannot be, with what is missing. `gpu`: its text.
[[nodiscard]] bool needs_flush(const RdmaAttributes& attributes, const std::string& gpu);

/// Blocks, some microseconds, until all writes of NICs whose completions were seen are visible to
/// this GPU. @throw std::runtime_error; then the GPU itself is in trouble.
void flush_remote_writes(const Gpu& gpu);

/// Makes the driver finish every synchronous copy and fill of the allocation at `address` before
/// the call returns: some return early, and a NIC that is told to read does not wait for them.
void make_copies_synchronous(const Gpu& gpu, DevicePtr address);

}  // namespace rkv::cuda
