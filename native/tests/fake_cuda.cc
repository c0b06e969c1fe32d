// SPDX-License-Identifier: Apache-2.0
#include "fake_cuda.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "fake_rdma.h"

namespace rkv::cuda {
namespace {

constexpr Result kInvalidValue = 1;
constexpr Result kInvalidContext = 201;
constexpr std::uint64_t kGpus = 2;

FakeCuda* fake = nullptr;
Context current = nullptr;

Context context_of(int gpu) {
  return reinterpret_cast<Context>(std::uintptr_t{0x100} + unsigned(gpu));
}
int gpu_of(Context context) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(context) - 0x100);
}

std::uint64_t page_bytes() { return static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)); }

const FakeCuda::Block* find_block(std::uint64_t address) {
  for (const FakeCuda::Block& block : fake->blocks) {
    if (address >= block.address && address < block.address + block.nbytes) return &block;
  }
  return nullptr;
}

Result get_error_name(Result error, const char** name) {
  *name = error == kInvalidValue ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OTHER";
  return kSuccess;
}

Result get_error_string(Result /*error*/, const char** text) {
  *text = "as the test wants it";
  return kSuccess;
}

Result device_get(Device* device, int ordinal) {
  *device = ordinal;
  return ordinal < static_cast<int>(kGpus) ? kSuccess : kInvalidValue;
}

Result device_get_name(char* name, int length, Device /*device*/) {
  std::snprintf(name, static_cast<std::size_t>(length), "Fake H100");
  return kSuccess;
}

Result device_get_pci_bus_id(char* id, int length, Device device) {
  std::snprintf(id, static_cast<std::size_t>(length), "0000:%02X:00.0", 0x1b + device);
  return kSuccess;
}

Result device_get_attribute(int* value, int attribute, Device /*device*/) {
  const auto found = fake->attributes.find(attribute);
  if (found == fake->attributes.end()) return kInvalidValue;
  *value = found->second;
  return kSuccess;
}

Result retain(Context* context, Device device) {
  ++fake->retained_contexts;
  *context = context_of(device);
  return kSuccess;
}

Result release(Device /*device*/) {
  --fake->retained_contexts;
  return kSuccess;
}

Result get_current(Context* context) {
  *context = current;
  return kSuccess;
}

Result set_current(Context context) {
  current = context;
  return kSuccess;
}

Result pointer_get_attribute(void* value, int attribute, DevicePtr address) {
  const FakeCuda::Block* block = find_block(address);
  if (block == nullptr) return kInvalidValue;
  if (attribute == kPointerMemoryType) *static_cast<unsigned*>(value) = kMemoryTypeDevice;
  if (attribute == kPointerDeviceOrdinal) *static_cast<int*>(value) = block->gpu;
  return kSuccess;
}

Result pointer_set_attribute(const void* value, int attribute, DevicePtr address) {
  if (fake->set_attribute_result != kSuccess) return fake->set_attribute_result;
  if (attribute != kPointerSyncMemops || *static_cast<const unsigned*>(value) != 1) {
    return kInvalidValue;
  }
  fake->synchronous.push_back(address);
  return kSuccess;
}

/// "dptr must be a pointer to an address aligned to the host page size", the size as well.
Result export_range(void* handle, DevicePtr address, std::size_t nbytes, int type,
                    std::uint64_t flags) {
  if (fake->export_result != kSuccess) return fake->export_result;
  const FakeCuda::Block* block = find_block(address);
  if (block == nullptr || type != 1 || address % page_bytes() != 0 || nbytes % page_bytes() != 0 ||
      address + nbytes > block->address + block->nbytes) {
    return kInvalidValue;
  }
  if (current != context_of(block->gpu)) return kInvalidContext;
  const int fd = eventfd(0, EFD_CLOEXEC);
  *static_cast<int*>(handle) = fd;
  fake->dmabufs[fd] = {address, nbytes};
  fake->exports.push_back({address, nbytes});
  fake->export_flags.push_back(flags);
  return kSuccess;
}

Result flush(int target, int scope) {
  if (fake->flush_result != kSuccess) return fake->flush_result;
  if (current == nullptr) return kInvalidContext;
  if (target != 0 || scope != 100) return kInvalidValue;
  fake->flushed.push_back(gpu_of(current));
  return kSuccess;
}

ibv_mr* reg_dmabuf_mr(ibv_pd* pd, std::uint64_t offset, std::size_t length, std::uint64_t iova,
                      int fd, int access) {
  const auto found = fake->dmabufs.find(fd);
  const bool fits = found != fake->dmabufs.end() && fcntl(fd, F_GETFD) >= 0 &&
                    offset + length <= found->second.nbytes &&
                    offset % page_bytes() == iova % page_bytes();
  errno = fake->dmabuf_mr_error != 0 ? fake->dmabuf_mr_error : EINVAL;
  if (!fits || fake->dmabuf_mr_error != 0) return nullptr;
  ++fake->dmabuf_mrs;
  return verbs::FakeFabric::table().reg_mr_iova2(
      pd, reinterpret_cast<void*>(found->second.address + offset), length, iova,
      static_cast<unsigned>(access));
}

}  // namespace

FakeCuda::FakeCuda()
    : attributes{{kGpuDirectRdmaSupported, 1},
                 {kGpuDirectRdmaFlushWritesOptions, 1},
                 {kGpuDirectRdmaWritesOrdering, 100},
                 {kDmaBufSupported, 1}} {
  fake = this;
  current = nullptr;
}

FakeCuda::~FakeCuda() {
  for (const Block& block : blocks) std::free(reinterpret_cast<void*>(block.address));
  fake = nullptr;
}

const Cuda& FakeCuda::table() {
  static const Cuda table = [] {
    Cuda cuda{};
    cuda.get_error_name = get_error_name;
    cuda.get_error_string = get_error_string;
    cuda.device_get = device_get;
    cuda.device_get_name = device_get_name;
    cuda.device_get_pci_bus_id = device_get_pci_bus_id;
    cuda.device_get_attribute = device_get_attribute;
    cuda.device_primary_ctx_retain = retain;
    cuda.device_primary_ctx_release = release;
    cuda.ctx_get_current = get_current;
    cuda.ctx_set_current = set_current;
    cuda.pointer_get_attribute = pointer_get_attribute;
    cuda.pointer_set_attribute = pointer_set_attribute;
    cuda.mem_get_handle_for_address_range = export_range;
    cuda.flush_gpu_direct_rdma_writes = flush;
    return cuda;
  }();
  return table;
}

const verbs::Ibverbs& FakeCuda::verbs_table() {
  static const verbs::Ibverbs table = [] {
    verbs::Ibverbs lib = verbs::FakeFabric::table();
    lib.reg_dmabuf_mr = reg_dmabuf_mr;
    return lib;
  }();
  return table;
}

std::uint64_t FakeCuda::allocate(std::size_t nbytes, int gpu) {
  const std::size_t rounded = (nbytes + page_bytes() - 1) / page_bytes() * page_bytes();
  void* memory = std::aligned_alloc(page_bytes(), rounded);
  std::fill_n(static_cast<unsigned char*>(memory), rounded, static_cast<unsigned char>(0));
  const auto address = reinterpret_cast<std::uint64_t>(memory);
  blocks.push_back({address, rounded, gpu});
  return address;
}

std::size_t FakeCuda::open_dmabufs() const {
  return static_cast<std::size_t>(
      std::count_if(dmabufs.begin(), dmabufs.end(),
                    [](const auto& one) { return fcntl(one.first, F_GETFD) >= 0; }));
}

}  // namespace rkv::cuda
