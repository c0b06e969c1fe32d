// SPDX-License-Identifier: Apache-2.0
#include "cuda/driver.h"

#include <stdexcept>

#include "core/shared_library.h"

namespace rkv::cuda {
namespace {

Cuda open_library() {
  const SharedLibrary library("libcuda.so.1", "install the NVIDIA driver",
                              "install an NVIDIA driver of release 525 or newer");
  Cuda cuda{};
  library.find("cuInit", cuda.init);
  library.find("cuGetErrorName", cuda.get_error_name);
  library.find("cuGetErrorString", cuda.get_error_string);
  library.find("cuDeviceGetCount", cuda.device_get_count);
  library.find("cuDeviceGet", cuda.device_get);
  library.find("cuDeviceGetName", cuda.device_get_name);
  library.find("cuDeviceGetUuid_v2", cuda.device_get_uuid);
  library.find("cuDeviceGetPCIBusId", cuda.device_get_pci_bus_id);
  library.find("cuDeviceGetAttribute", cuda.device_get_attribute);
  library.find("cuDeviceCanAccessPeer", cuda.device_can_access_peer);
  library.find("cuDeviceGetP2PAttribute", cuda.device_get_p2p_attribute);
  library.find("cuDevicePrimaryCtxRetain", cuda.device_primary_ctx_retain);
  library.find("cuDevicePrimaryCtxRelease_v2", cuda.device_primary_ctx_release);
  library.find("cuCtxGetCurrent", cuda.ctx_get_current);
  library.find("cuCtxSetCurrent", cuda.ctx_set_current);
  library.find("cuCtxGetDevice", cuda.ctx_get_device);
  library.find("cuMemAlloc_v2", cuda.mem_alloc);
  library.find("cuMemFree_v2", cuda.mem_free);
  library.find("cuMemHostAlloc", cuda.mem_host_alloc);
  library.find("cuMemFreeHost", cuda.mem_free_host);
  library.find("cuMemHostGetDevicePointer_v2", cuda.mem_host_get_device_pointer);
  library.find("cuMemGetAddressRange_v2", cuda.mem_get_address_range);
  library.find("cuMemcpyDtoHAsync_v2", cuda.memcpy_dtoh_async);
  library.find("cuMemsetD32Async", cuda.memset_d32_async);
  library.find("cuPointerGetAttribute", cuda.pointer_get_attribute);
  library.find("cuPointerSetAttribute", cuda.pointer_set_attribute);
  library.find("cuStreamCreateWithPriority", cuda.stream_create_with_priority);
  library.find("cuStreamDestroy_v2", cuda.stream_destroy);
  library.find("cuStreamSynchronize", cuda.stream_synchronize);
  library.find("cuStreamQuery", cuda.stream_query);
  library.find("cuStreamWriteValue64_v2", cuda.stream_write_value64);
  library.find("cuCtxGetStreamPriorityRange", cuda.ctx_get_stream_priority_range);
  library.find("cuModuleLoadData", cuda.module_load_data);
  library.find("cuModuleUnload", cuda.module_unload);
  library.find("cuModuleGetFunction", cuda.module_get_function);
  library.find("cuLaunchKernel", cuda.launch_kernel);
  library.find("cuIpcGetMemHandle", cuda.ipc_get_mem_handle);
  library.find("cuIpcOpenMemHandle_v2", cuda.ipc_open_mem_handle);
  library.find("cuIpcCloseMemHandle", cuda.ipc_close_mem_handle);
  library.find("cuMemRetainAllocationHandle", cuda.mem_retain_allocation_handle);
  library.find("cuMemGetAllocationPropertiesFromHandle",
               cuda.mem_get_allocation_properties_from_handle);
  library.find("cuMemExportToShareableHandle", cuda.mem_export_to_shareable_handle);
  library.find("cuMemImportFromShareableHandle", cuda.mem_import_from_shareable_handle);
  library.find("cuMemCreate", cuda.mem_create);
  library.find("cuMemRelease", cuda.mem_release);
  library.find("cuMemAddressReserve", cuda.mem_address_reserve);
  library.find("cuMemAddressFree", cuda.mem_address_free);
  library.find("cuMemMap", cuda.mem_map);
  library.find("cuMemUnmap", cuda.mem_unmap);
  library.find("cuMemSetAccess", cuda.mem_set_access);
  library.find_optional("cuMemGetHandleForAddressRange", cuda.mem_get_handle_for_address_range);
  library.find_optional("cuFlushGPUDirectRDMAWrites", cuda.flush_gpu_direct_rdma_writes);
  check(cuda, cuda.init(0), "cuInit()",
        "see nvidia-smi; a driver update without a reboot and a container without --gpus or --nv "
        "are the usual causes");
  return cuda;
}

}  // namespace

const Cuda& load_cuda() {
  static const Cuda cuda = open_library();
  return cuda;
}

std::string result_text(const Cuda& cuda, Result result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuda.get_error_name(result, &name) != kSuccess) {
    return "CUresult " + std::to_string(result);
  }
  cuda.get_error_string(result, &text);
  return std::string(name) + " (" + text + ")";
}

void check(const Cuda& cuda, Result result, const std::string& call, const std::string& remedy) {
  if (result == kSuccess) return;
  throw std::runtime_error(call + ": " + result_text(cuda, result) +
                           (remedy.empty() ? "" : "; " + remedy));
}

}  // namespace rkv::cuda
