// SPDX-License-Identifier: Apache-2.0
#include "cuda/dmabuf.h"

#include <unistd.h>

namespace rkv::cuda {
namespace {

constexpr int kDmaBufFd = 1;  ///< CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
/// Not CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE. That is for a NIC with a PCIe path of its own
/// to the GPU beside the CPU's (Data Direct of ConnectX-8), and such a mapping works only with
/// mlx5dv_reg_dmabuf_mr(). Without the flag the driver takes the way that every NIC has.
constexpr std::uint64_t kDefaultMapping = 0;

}  // namespace

std::string find_dmabuf_fault(const Gpu& gpu) {
  if (gpu.cuda().mem_get_handle_for_address_range == nullptr) {
    return "the NVIDIA driver is older than CUDA 11.7";
  }
  int supported = 0;
  // A driver that does not know the attribute has no dma-buf either.
  const Result result = gpu.cuda().device_get_attribute(&supported, kDmaBufSupported, gpu.device());
  if (result == kSuccess && supported != 0) return "";
  return gpu.text() +
         " does not export any (CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED is 0: NVIDIA's closed kernel "
         "module does not, nor does Linux before 5.12)";
}

/// Of the range asked for and never of what cuMemGetAddressRange() says: for memory in several
/// pieces, such as PyTorch's expandable segments, that names only the first piece. The pages are
/// the allocation's even where the range's ends are not, since GPU pages are no smaller.
DmaBuf export_dmabuf(const Gpu& gpu, const MemoryRange& range) {
  const MemoryRange pages = pages_around(range, static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)));
  const Cuda& cuda = gpu.cuda();
  const Current current(cuda, gpu.context());
  int fd = -1;
  check(cuda,
        cuda.mem_get_handle_for_address_range(&fd, pages.address, pages.nbytes, kDmaBufFd,
                                              kDefaultMapping),
        "cuMemGetHandleForAddressRange(" + pages.text() + ")",
        "memory from cuMemCreate() must be created with gpuDirectRDMACapable");
  return {.fd = UniqueFd(fd), .offset = range.address - pages.address};
}

MemoryRange pages_around(const MemoryRange& range, std::uint64_t page_bytes) {
  const std::uint64_t first = range.address - range.address % page_bytes;
  const std::uint64_t nbytes = range.address - first + range.nbytes;
  return {first, (nbytes + page_bytes - 1) / page_bytes * page_bytes};
}

}  // namespace rkv::cuda
