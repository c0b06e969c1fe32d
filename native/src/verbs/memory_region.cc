// SPDX-License-Identifier: Apache-2.0
#include "verbs/memory_region.h"

#include <cerrno>
#include <filesystem>
#include <sstream>
#include <stdexcept>

#include "core/error.h"
#include "cuda/dmabuf.h"

namespace rkv::verbs {
namespace {

/// By address, with errno set if the result is empty.
Handle<ibv_mr> register_address(const Rail& rail, const MemoryRange& range, unsigned access) {
  const Ibverbs& lib = rail.lib();
  void* address = reinterpret_cast<void*>(range.address);
  if (lib.reg_mr_iova2 != nullptr) {
    return {lib.reg_mr_iova2(rail.pd(), address, range.nbytes, range.address, access),
            Release{&lib}};
  }
  return {(lib.reg_mr)(rail.pd(), address, range.nbytes,
                       static_cast<int>(access & ~unsigned{IBV_ACCESS_OPTIONAL_RANGE})),
          Release{&lib}};
}

/// As a dma-buf. If the result is empty, `fault` says why.
Handle<ibv_mr> register_dmabuf(const Rail& rail, const MemoryRange& range, unsigned access,
                               const cuda::Gpu& gpu, std::string& fault) {
  const Ibverbs& lib = rail.lib();
  fault = lib.reg_dmabuf_mr == nullptr ? "libibverbs is older than rdma-core 34"
                                       : cuda::find_dmabuf_fault(gpu);
  if (!fault.empty()) return {};
  try {
    const cuda::DmaBuf exported = cuda::export_dmabuf(gpu, range);
    // By its own addresses (iova), like all other memory. Any offset will do, as long as both
    // start at the same place in a page, which they do: the dma-buf starts on a page.
    Handle<ibv_mr> mr(lib.reg_dmabuf_mr(rail.pd(), exported.offset, range.nbytes, range.address,
                                        exported.fd.get(), static_cast<int>(access)),
                      Release{&lib});
    if (!mr) fault = call_error("ibv_reg_dmabuf_mr", errno);
    return mr;
  } catch (const std::runtime_error& error) {
    fault = error.what();
    return {};
  }
}

/// Also under the names that it had before it came with the driver.
bool has_peermem() {
  for (const char* path :
       {"/sys/module/nvidia_peermem", "/sys/module/nv_peer_mem",
        "/sys/kernel/mm/memory_peers/nv_mem", "/sys/kernel/mm/memory_peers/nv_mem_nc"}) {
    std::error_code error;
    if (std::filesystem::exists(path, error)) return true;
  }
  return false;
}

std::string call_text(const Rail& rail, const MemoryRange& range, const std::string& what) {
  std::ostringstream call;
  call << "ibv_reg_mr(" << rail.name() << ", 0x" << std::hex << range.address << ", " << std::dec
       << range.nbytes << " bytes" << what << ")";
  return call.str();
}

}  // namespace

Handle<ibv_mr> register_host_mr(const Rail& rail, const MemoryRange& range, unsigned access) {
  Handle<ibv_mr> mr = register_address(rail, range, access);
  if (!mr) {
    const int error = errno;
    throw_errno(call_text(rail, range, ""), error,
                error == ENOMEM   ? kMemlockRemedy
                : error == EFAULT ? "the range is not mapped, or not by this process"
                                  : "see the kernel log");
  }
  return mr;
}

Handle<ibv_mr> register_gpu_mr(const Rail& rail, const MemoryRange& range, unsigned access,
                               const cuda::Gpu& gpu) {
  std::string dmabuf_fault;
  Handle<ibv_mr> mr = register_dmabuf(rail, range, access, gpu, dmabuf_fault);
  if (!mr) mr = register_address(rail, range, access);
  if (!mr) {
    const int error = errno;
    throw_errno(call_text(rail, range, " of " + gpu.text()), error,
                gpu_mr_remedy(has_peermem(), dmabuf_fault));
  }
  return mr;
}

std::string gpu_mr_remedy(bool has_peermem, const std::string& dmabuf_fault) {
  if (has_peermem) {
    return "nvidia_peermem is loaded, so see the kernel log and whether BAR1 has room (nvidia-smi "
           "-q -d MEMORY); dma-buf is unavailable because " +
           dmabuf_fault;
  }
  return "nvidia_peermem is not loaded and dma-buf is unavailable because " + dmabuf_fault +
         "; run `modprobe nvidia_peermem`, or use NVIDIA's open kernel modules and Linux 5.12 or "
         "newer";
}

}  // namespace rkv::verbs
