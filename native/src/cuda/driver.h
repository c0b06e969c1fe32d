// SPDX-License-Identifier: Apache-2.0
/// The CUDA driver, opened at run time: one build runs with and without a GPU.
///
/// Types and values are those of cuda.h (CUDA 12.6), which need not be installed to build this.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace rkv::cuda {

using Result = int;
using Device = int;
using DevicePtr = std::uint64_t;
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using AllocationHandle = std::uint64_t;

constexpr Result kSuccess = 0;

struct IpcMemHandle {
  std::array<char, 64> reserved;
};
struct Uuid {
  std::array<unsigned char, 16> bytes;
};
/// CUmemLocation, CUmemAllocationProp, CUmemAccessDesc.
struct MemLocation {
  int type = 1;  ///< CU_MEM_LOCATION_TYPE_DEVICE
  int id = 0;
};
struct AllocationProperties {
  int type = 1;  ///< CU_MEM_ALLOCATION_TYPE_PINNED
  int handle_types = 0;
  MemLocation location;
  void* win32_meta_data = nullptr;
  struct {
    unsigned char compression_type = 0;
    unsigned char gpu_direct_rdma_capable = 0;
    unsigned short usage = 0;
    unsigned char reserved[4] = {};
  } flags;
};
struct MemAccess {
  MemLocation location;
  int flags = 3;  ///< CU_MEM_ACCESS_FLAGS_PROT_READWRITE
};

enum DeviceAttribute : int {
  kCanUseStreamMemOps64 = 122,
  kGpuDirectRdmaSupported = 116,
  kGpuDirectRdmaFlushWritesOptions = 117,
  kGpuDirectRdmaWritesOrdering = 118,
  kDmaBufSupported = 124,
};
enum P2pAttribute : int {
  kNativeAtomicSupported = 3,
};
enum PointerAttribute : int {
  kPointerMemoryType = 2,
  kPointerSyncMemops = 6,
  kPointerDeviceOrdinal = 9,
};
constexpr unsigned kMemoryTypeDevice = 2;
constexpr int kPosixFileDescriptor = 1;          ///< CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
constexpr unsigned kHostAllocPortable = 0x01;    ///< CU_MEMHOSTALLOC_PORTABLE
constexpr unsigned kHostAllocMapped = 0x02;      ///< CU_MEMHOSTALLOC_DEVICEMAP
constexpr unsigned kStreamNonBlocking = 0x01;    ///< CU_STREAM_NON_BLOCKING
constexpr unsigned kLazyEnablePeerAccess = 0x1;  ///< CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS

/// The functions of libcuda that the engine calls, by their own names; tests fill a table of their
/// own.
struct Cuda {
  Result (*init)(unsigned flags);
  Result (*get_error_name)(Result error, const char** name);
  Result (*get_error_string)(Result error, const char** text);
  Result (*device_get_count)(int* count);
  Result (*device_get)(Device* device, int ordinal);
  Result (*device_get_name)(char* name, int length, Device device);
  Result (*device_get_uuid)(Uuid* uuid, Device device);
  Result (*device_get_pci_bus_id)(char* id, int length, Device device);
  Result (*device_get_attribute)(int* value, int attribute, Device device);
  Result (*device_can_access_peer)(int* can, Device device, Device peer);
  Result (*device_get_p2p_attribute)(int* value, int attribute, Device device, Device peer);
  Result (*device_primary_ctx_retain)(Context* context, Device device);
  Result (*device_primary_ctx_release)(Device device);
  Result (*ctx_get_current)(Context* context);
  Result (*ctx_set_current)(Context context);
  Result (*ctx_get_device)(Device* device);
  Result (*mem_alloc)(DevicePtr* address, std::size_t nbytes);
  Result (*mem_free)(DevicePtr address);
  Result (*mem_host_alloc)(void** address, std::size_t nbytes, unsigned flags);
  Result (*mem_free_host)(void* address);
  Result (*mem_host_get_device_pointer)(DevicePtr* device, void* host, unsigned flags);
  Result (*mem_get_address_range)(DevicePtr* base, std::size_t* nbytes, DevicePtr address);
  Result (*memcpy_dtoh_async)(void* to, DevicePtr from, std::size_t nbytes, Stream stream);
  Result (*memset_d32_async)(DevicePtr to, unsigned value, std::size_t count, Stream stream);
  Result (*pointer_get_attribute)(void* value, int attribute, DevicePtr address);
  Result (*pointer_set_attribute)(const void* value, int attribute, DevicePtr address);
  Result (*stream_create_with_priority)(Stream* stream, unsigned flags, int priority);
  Result (*stream_destroy)(Stream stream);
  Result (*stream_synchronize)(Stream stream);
  Result (*stream_query)(Stream stream);
  Result (*stream_write_value64)(Stream stream, DevicePtr address, std::uint64_t value,
                                 unsigned flags);
  Result (*ctx_get_stream_priority_range)(int* least, int* greatest);
  Result (*module_load_data)(Module* module, const void* image);
  Result (*module_unload)(Module module);
  Result (*module_get_function)(Function* function, Module module, const char* name);
  Result (*launch_kernel)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z,
                          unsigned shared_bytes, Stream stream, void** parameters, void** extra);
  Result (*ipc_get_mem_handle)(IpcMemHandle* handle, DevicePtr address);
  Result (*ipc_open_mem_handle)(DevicePtr* address, IpcMemHandle handle, unsigned flags);
  Result (*ipc_close_mem_handle)(DevicePtr address);
  Result (*mem_retain_allocation_handle)(AllocationHandle* handle, void* address);
  Result (*mem_get_allocation_properties_from_handle)(AllocationProperties* properties,
                                                      AllocationHandle handle);
  Result (*mem_export_to_shareable_handle)(void* shareable, AllocationHandle handle, int type,
                                           std::uint64_t flags);
  Result (*mem_import_from_shareable_handle)(AllocationHandle* handle, void* shareable, int type);
  Result (*mem_create)(AllocationHandle* handle, std::size_t nbytes,
                       const AllocationProperties* properties, std::uint64_t flags);
  Result (*mem_release)(AllocationHandle handle);
  Result (*mem_address_reserve)(DevicePtr* address, std::size_t nbytes, std::size_t alignment,
                                DevicePtr hint, std::uint64_t flags);
  Result (*mem_address_free)(DevicePtr address, std::size_t nbytes);
  Result (*mem_map)(DevicePtr address, std::size_t nbytes, std::size_t offset,
                    AllocationHandle handle, std::uint64_t flags);
  Result (*mem_unmap)(DevicePtr address, std::size_t nbytes);
  Result (*mem_set_access)(DevicePtr address, std::size_t nbytes, const MemAccess* access,
                           std::size_t count);
  /// Null before CUDA 11.7: no dma-buf export.
  Result (*mem_get_handle_for_address_range)(void* handle, DevicePtr address, std::size_t nbytes,
                                             int type, std::uint64_t flags);
  /// Null before CUDA 11.3.
  Result (*flush_gpu_direct_rdma_writes)(int target, int scope);
};

/// Opens libcuda.so.1 once per process, initialises it and never closes it.
/// @throw std::runtime_error with what is missing and what to do.
[[nodiscard]] const Cuda& load_cuda();

/// "CUDA_ERROR_INVALID_VALUE (invalid argument)".
[[nodiscard]] std::string result_text(const Cuda& cuda, Result result);

/// @throw std::runtime_error "cuMemAlloc(64 bytes): CUDA_ERROR_… (…); <remedy>" unless kSuccess.
void check(const Cuda& cuda, Result result, const std::string& call,
           const std::string& remedy = {});

/// Makes a device's primary context, the one that PyTorch uses, current for a scope.
class Current {
 public:
  Current(const Cuda& cuda, Context context) : cuda_(cuda) {
    cuda_.ctx_get_current(&before_);
    if (before_ != context) cuda_.ctx_set_current(context);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() { cuda_.ctx_set_current(before_); }

 private:
  const Cuda& cuda_;
  Context before_ = nullptr;
};

}  // namespace rkv::cuda
