// SPDX-License-Identifier: Apache-2.0
#include "cuda/driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace rkv::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

template <class Function>
void find_optional(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  find_optional(library, name, function);
  if (function == nullptr) {
    throw std::runtime_error(std::string(kLibrary) + " lacks " + name +
                             "; install an NVIDIA driver of release 525 or newer");
  }
}

Cuda open_library() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error(std::string(dlerror()) + "; install the NVIDIA driver");
  }
  Cuda cuda{};
  find(library, "cuInit", cuda.init);
  find(library, "cuGetErrorName", cuda.get_error_name);
  find(library, "cuGetErrorString", cuda.get_error_string);
  find(library, "cuDeviceGetCount", cuda.device_get_count);
  find(library, "cuDeviceGet", cuda.device_get);
  find(library, "cuDeviceGetName", cuda.device_get_name);
  find(library, "cuDeviceGetUuid_v2", cuda.device_get_uuid);
  find(library, "cuDeviceGetPCIBusId", cuda.device_get_pci_bus_id);
  find(library, "cuDeviceGetAttribute", cuda.device_get_attribute);
  find(library, "cuDeviceCanAccessPeer", cuda.device_can_access_peer);
  find(library, "cuDeviceGetP2PAttribute", cuda.device_get_p2p_attribute);
  find(library, "cuDevicePrimaryCtxRetain", cuda.device_primary_ctx_retain);
  find(library, "cuDevicePrimaryCtxRelease_v2", cuda.device_primary_ctx_release);
  find(library, "cuCtxGetCurrent", cuda.ctx_get_current);
  find(library, "cuCtxSetCurrent", cuda.ctx_set_current);
  find(library, "cuCtxGetDevice", cuda.ctx_get_device);
  find(library, "cuCtxEnablePeerAccess", cuda.ctx_enable_peer_access);
  find(library, "cuMemAlloc_v2", cuda.mem_alloc);
  find(library, "cuMemFree_v2", cuda.mem_free);
  find(library, "cuMemHostAlloc", cuda.mem_host_alloc);
  find(library, "cuMemFreeHost", cuda.mem_free_host);
  find(library, "cuMemHostGetDevicePointer_v2", cuda.mem_host_get_device_pointer);
  find(library, "cuMemGetAddressRange_v2", cuda.mem_get_address_range);
  find(library, "cuMemcpyDtoHAsync_v2", cuda.memcpy_dtoh_async);
  find(library, "cuMemcpyHtoDAsync_v2", cuda.memcpy_htod_async);
  find(library, "cuMemsetD32Async", cuda.memset_d32_async);
  find(library, "cuPointerGetAttribute", cuda.pointer_get_attribute);
  find(library, "cuPointerSetAttribute", cuda.pointer_set_attribute);
  find(library, "cuStreamCreateWithPriority", cuda.stream_create_with_priority);
  find(library, "cuStreamDestroy_v2", cuda.stream_destroy);
  find(library, "cuStreamSynchronize", cuda.stream_synchronize);
  find(library, "cuStreamQuery", cuda.stream_query);
  find(library, "cuStreamWriteValue64_v2", cuda.stream_write_value64);
  find(library, "cuCtxGetStreamPriorityRange", cuda.ctx_get_stream_priority_range);
  find(library, "cuModuleLoadData", cuda.module_load_data);
  find(library, "cuModuleUnload", cuda.module_unload);
  find(library, "cuModuleGetFunction", cuda.module_get_function);
  find(library, "cuLaunchKernel", cuda.launch_kernel);
  find(library, "cuIpcGetMemHandle", cuda.ipc_get_mem_handle);
  find(library, "cuIpcOpenMemHandle_v2", cuda.ipc_open_mem_handle);
  find(library, "cuIpcCloseMemHandle", cuda.ipc_close_mem_handle);
  find(library, "cuMemRetainAllocationHandle", cuda.mem_retain_allocation_handle);
  find(library, "cuMemGetAllocationPropertiesFromHandle",
       cuda.mem_get_allocation_properties_from_handle);
  find(library, "cuMemExportToShareableHandle", cuda.mem_export_to_shareable_handle);
  find(library, "cuMemImportFromShareableHandle", cuda.mem_import_from_shareable_handle);
  find(library, "cuMemCreate", cuda.mem_create);
  find(library, "cuMemRelease", cuda.mem_release);
  find(library, "cuMemAddressReserve", cuda.mem_address_reserve);
  find(library, "cuMemAddressFree", cuda.mem_address_free);
  find(library, "cuMemMap", cuda.mem_map);
  find(library, "cuMemUnmap", cuda.mem_unmap);
  find(library, "cuMemSetAccess", cuda.mem_set_access);
  find_optional(library, "cuMemGetHandleForAddressRange", cuda.mem_get_handle_for_address_range);
  find_optional(library, "cuFlushGPUDirectRDMAWrites", cuda.flush_gpu_direct_rdma_writes);
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
