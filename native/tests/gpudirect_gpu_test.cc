// SPDX-License-Identifier: Apache-2.0
/// What GPUDirect RDMA needs of a real driver and a real GPU; skipped where there is none. No NIC
/// is needed: what a NIC would map is exported, and what it would rely on is asked for.
#include <gtest/gtest.h>
#include <sys/types.h>
#include <unistd.h>

#include <iostream>
#include <optional>

#include "cuda/dmabuf.h"
#include "cuda/visibility.h"

namespace rkv::cuda {
namespace {

constexpr std::uint64_t kPiece = 2 << 20;  ///< The granularity of cuMemCreate().

class GpuDirect : public testing::Test {
 protected:
  void SetUp() override {
    try {
      gpu_ = current_gpu();
    } catch (const std::runtime_error& error) {
      GTEST_SKIP() << error.what();
    }
    current_.emplace(cuda(), gpu_->context());
  }
  void TearDown() override {
    for (const DevicePtr address : allocations_) cuda().mem_free(address);
  }
  [[nodiscard]] const Cuda& cuda() const { return gpu_->cuda(); }
  DevicePtr allocate(std::size_t nbytes) {
    DevicePtr address = 0;
    check(cuda(), cuda().mem_alloc(&address, nbytes), "cuMemAlloc()");
    allocations_.push_back(address);
    return address;
  }
  /// Whether a dma-buf of the pages around `range` comes out of it.
  void expect_export(const MemoryRange& range) {
    const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
    const DmaBuf exported = export_dmabuf(*gpu_, range);
    ASSERT_TRUE(exported.fd);
    EXPECT_EQ(exported.offset, range.address % page);
    const off_t nbytes = lseek(exported.fd.get(), 0, SEEK_END);
    EXPECT_EQ(nbytes, static_cast<off_t>(pages_around(range, page).nbytes)) << range.text();
  }

  std::shared_ptr<const Gpu> gpu_;

 private:
  std::optional<Current> current_;
  std::vector<DevicePtr> allocations_;
};

TEST_F(GpuDirect, AttributesSayWhatToDo) {
  const RdmaAttributes attributes = read_rdma_attributes(*gpu_);
  const std::string fault = find_dmabuf_fault(*gpu_);
  std::cout << gpu_->text() << ": GPUDirect RDMA " << (attributes.supported ? "yes" : "no")
            << ", writes ordering " << attributes.ordering << ", flush options "
            << attributes.flush_options << ", dma-buf " << (fault.empty() ? "yes" : fault) << "\n";
  if (!attributes.supported) GTEST_SKIP() << "no GPUDirect RDMA";
  EXPECT_TRUE(attributes.ordering == 0 || attributes.ordering == 100 || attributes.ordering == 200);
  EXPECT_NO_THROW((void)needs_flush(attributes, gpu_->text()));
}

TEST_F(GpuDirect, Flushes) {
  if ((read_rdma_attributes(*gpu_).flush_options & 1) == 0) GTEST_SKIP() << "no flush by the host";
  // Also on a thread without a context.
  check(cuda(), cuda().ctx_set_current(nullptr), "cuCtxSetCurrent()");
  EXPECT_NO_THROW(flush_remote_writes(*gpu_));
  Context context = gpu_->context();
  cuda().ctx_get_current(&context);
  EXPECT_EQ(context, nullptr);
}

TEST_F(GpuDirect, KnowsItsMemory) {
  const DevicePtr memory = allocate(1 << 20);
  EXPECT_NO_THROW((void)device_of(cuda(), memory + 5));
  const unsigned on = 1;
  EXPECT_EQ(cuda().pointer_set_attribute(&on, kPointerSyncMemops, memory), kSuccess);
  EXPECT_NO_THROW(make_copies_synchronous(*gpu_, memory));
  int host = 0;
  EXPECT_THROW((void)device_of(cuda(), reinterpret_cast<DevicePtr>(&host)), std::invalid_argument);
}

TEST_F(GpuDirect, ExportsAlignedAndOddRanges) {
  if (const std::string fault = find_dmabuf_fault(*gpu_); !fault.empty()) GTEST_SKIP() << fault;
  const DevicePtr memory = allocate(8 << 20);
  expect_export({memory, 8 << 20});
  expect_export({memory + (1 << 20), 2 << 20});
  expect_export({memory + 5000, 10000});
  expect_export({memory + 4095, 2});
  expect_export({memory + (8 << 20) - 1, 1});
  // Smaller than a page, and an end that is none of a page.
  const DevicePtr small = allocate(1000);
  expect_export({small, 1000});
  const DevicePtr uneven = allocate((3 << 20) + 512);
  expect_export({uneven, (3 << 20) + 512});
}

/// As PyTorch's expandable segments are: one range of addresses, several pieces of memory.
TEST_F(GpuDirect, ExportsMemoryInPieces) {
  if (const std::string fault = find_dmabuf_fault(*gpu_); !fault.empty()) GTEST_SKIP() << fault;
  AllocationProperties properties;
  properties.location.id = gpu_->device();
  properties.flags.gpu_direct_rdma_capable = 1;
  DevicePtr base = 0;
  check(cuda(), cuda().mem_address_reserve(&base, 3 * kPiece, 0, 0, 0), "cuMemAddressReserve()");
  for (std::uint64_t i = 0; i < 3; ++i) {
    AllocationHandle handle = 0;
    check(cuda(), cuda().mem_create(&handle, kPiece, &properties, 0), "cuMemCreate()");
    check(cuda(), cuda().mem_map(base + i * kPiece, kPiece, 0, handle, 0), "cuMemMap()");
    check(cuda(), cuda().mem_release(handle), "cuMemRelease()");
  }
  const MemAccess access{.location = properties.location};
  check(cuda(), cuda().mem_set_access(base, 3 * kPiece, &access, 1), "cuMemSetAccess()");
  EXPECT_NO_THROW((void)device_of(cuda(), base + kPiece));
  EXPECT_NO_THROW(make_copies_synchronous(*gpu_, base));
  expect_export({base, 3 * kPiece});
  expect_export({base + kPiece - 100, 200});
  cuda().mem_unmap(base, 3 * kPiece);
  cuda().mem_address_free(base, 3 * kPiece);
}

}  // namespace
}  // namespace rkv::cuda
