// SPDX-License-Identifier: Apache-2.0
/// GPU memory in the verbs backend, with fake GPUs and a fake fabric.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "backend_node.h"
#include "cuda/dmabuf.h"
#include "cuda/visibility.h"
#include "fake_cuda.h"
#include "verbs/memory_region.h"
#include "verbs/registration.h"

namespace rkv::verbs {
namespace {

using cuda::FakeCuda;
using cuda::Gpu;

constexpr std::uint64_t kMiB = 1 << 20;
constexpr MemoryUse kGpuMemory{.kind = MemoryKind::kCuda};
constexpr MemoryUse kGpuSource{.kind = MemoryKind::kCuda, .peer_writable = false};

TEST(DmaBuf, PagesAroundARange) {
  const auto pages = [](std::uint64_t address, std::uint64_t nbytes, std::uint64_t page) {
    const MemoryRange found = cuda::pages_around({address, nbytes}, page);
    return std::pair(found.address, found.nbytes);
  };
  EXPECT_EQ(pages(0x10000, 0x2000, 4096), std::pair(0x10000UL, 0x2000UL));
  EXPECT_EQ(pages(0x10001, 1, 4096), std::pair(0x10000UL, 0x1000UL));
  EXPECT_EQ(pages(0x10fff, 2, 4096), std::pair(0x10000UL, 0x2000UL));
  EXPECT_EQ(pages(0x10001, 0x2000, 4096), std::pair(0x10000UL, 0x3000UL));
  EXPECT_EQ(pages(0x11000, 0x1000, 65536), std::pair(0x10000UL, 0x10000UL));
}

TEST(DmaBuf, HoldsTheRangeAtItsOffset) {
  FakeCuda fake;
  const std::uint64_t memory = fake.allocate(kMiB);
  const Gpu gpu(FakeCuda::table(), 0);
  {
    const cuda::DmaBuf exported = cuda::export_dmabuf(gpu, {memory + 5000, 10000});
    EXPECT_EQ(exported.offset, (memory + 5000) % static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)));
    ASSERT_EQ(fake.exports.size(), 1U);
    EXPECT_TRUE(fake.exports[0].contains(memory + 5000, 10000));
    EXPECT_EQ(fake.export_flags[0], 0U);
    EXPECT_EQ(fake.open_dmabufs(), 1U);
  }
  EXPECT_EQ(fake.open_dmabufs(), 0U);
  fake.export_result = 1;
  try {
    (void)cuda::export_dmabuf(gpu, {memory, 4096});
    ADD_FAILURE() << "exported";
  } catch (const std::runtime_error& error) {
    EXPECT_TRUE(has_words(error.what(), {"cuMemGetHandleForAddressRange([0x", "INVALID_VALUE",
                                         "gpuDirectRDMACapable"}));
  }
}

TEST(DmaBuf, SaysWhyThereIsNone) {
  FakeCuda fake;
  const Gpu gpu(FakeCuda::table(), 0);
  EXPECT_EQ(cuda::find_dmabuf_fault(gpu), "");
  fake.attributes[cuda::kDmaBufSupported] = 0;
  EXPECT_TRUE(has_words(cuda::find_dmabuf_fault(gpu), {"GPU 0 (Fake H100", "DMA_BUF_SUPPORTED"}));
  fake.attributes.erase(cuda::kDmaBufSupported);
  EXPECT_TRUE(has_words(cuda::find_dmabuf_fault(gpu), {"DMA_BUF_SUPPORTED"}));
  cuda::Cuda old = FakeCuda::table();
  old.mem_get_handle_for_address_range = nullptr;
  const Gpu old_gpu(old, 0);
  EXPECT_TRUE(has_words(cuda::find_dmabuf_fault(old_gpu), {"older than CUDA 11.7"}));
}

TEST(Visibility, FlushedOnlyWhereTheGpuDoesNotOrder) {
  EXPECT_FALSE(cuda::needs_flush({.flush_options = 0, .ordering = 100}, "GPU 0"));
  EXPECT_FALSE(cuda::needs_flush({.flush_options = 3, .ordering = 200}, "GPU 0"));
  EXPECT_TRUE(cuda::needs_flush({.flush_options = 1, .ordering = 0}, "GPU 0"));
  EXPECT_TRUE(cuda::needs_flush({.flush_options = 3, .ordering = 0}, "GPU 0"));
  try {
    // By the stream only, of which the engine knows none.
    (void)cuda::needs_flush({.flush_options = 2, .ordering = 0}, "GPU 7");
    ADD_FAILURE() << "no way to flush";
  } catch (const std::runtime_error& error) {
    EXPECT_TRUE(has_words(error.what(), {"GPU 7", "ORDERING is 0", "OPTIONS is 2", "driver"}));
  }
}

TEST(Visibility, ReadsTheAttributes) {
  FakeCuda fake;
  const Gpu gpu(FakeCuda::table(), 0);
  fake.attributes = {{cuda::kGpuDirectRdmaSupported, 1},
                     {cuda::kGpuDirectRdmaFlushWritesOptions, 3},
                     {cuda::kGpuDirectRdmaWritesOrdering, 200}};
  cuda::RdmaAttributes attributes = cuda::read_rdma_attributes(gpu);
  EXPECT_TRUE(attributes.supported);
  EXPECT_EQ(attributes.flush_options, 3);
  EXPECT_EQ(attributes.ordering, 200);
  fake.attributes = {{cuda::kDmaBufSupported, 1}};  // An old driver's.
  attributes = cuda::read_rdma_attributes(gpu);
  EXPECT_TRUE(attributes.supported);
  EXPECT_EQ(attributes.ordering, 0);
  fake.attributes.clear();
  EXPECT_FALSE(cuda::read_rdma_attributes(gpu).supported);
  cuda::Cuda old = FakeCuda::table();
  old.flush_gpu_direct_rdma_writes = nullptr;
  fake.attributes[cuda::kGpuDirectRdmaFlushWritesOptions] = 1;
  const Gpu old_gpu(old, 0);
  EXPECT_EQ(cuda::read_rdma_attributes(old_gpu).flush_options, 0);
}

/// Rails of one host with GPUs.
struct GpuHost {
  explicit GpuHost(const FakeOptions& options = fake_fabric(1),
                   const Ibverbs& lib = FakeCuda::verbs_table())
      : fabric(options) {
    for (const FakeDeviceOptions& device : options.devices) {
      rails.push_back(std::make_shared<Rail>(lib, device.name, std::uint8_t{1}));
    }
  }
  std::unique_ptr<Registration> pin(const MemoryRange& range, const MemoryUse& use = kGpuMemory,
                                    const cuda::Cuda& table = FakeCuda::table()) {
    return std::make_unique<Registration>(rails, range, use, kMiB, pinned,
                                          std::make_shared<const Gpu>(table, 0));
  }
  std::string error(const MemoryRange& range, const MemoryUse& use = kGpuMemory) {
    try {
      (void)pin(range, use);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }

  FakeCuda fake;
  CleanFabric fabric;
  std::vector<std::shared_ptr<Rail>> rails;
  PinnedBytes pinned = 0;
};

TEST(GpuRegistration, IsADmaBufOnEveryRail) {
  GpuHost host(fake_fabric(2));
  const std::uint64_t memory = host.fake.allocate(4 * kMiB);
  {
    const auto registration = host.pin({memory + 100, 3 * kMiB});
    EXPECT_EQ(registration->regions(), 2U);
    EXPECT_EQ(host.fake.dmabuf_mrs, 2U);
    EXPECT_EQ(host.fake.open_dmabufs(), 0U);  // The MR holds the memory by itself.
    EXPECT_EQ(host.fake.synchronous, std::vector<std::uint64_t>{memory + 100});
    EXPECT_FALSE(registration->local_keys(0).cpu_readable);
    EXPECT_EQ(registration->gpu_to_flush(), nullptr);
    EXPECT_EQ(host.pinned, 0U);  // No host memory is.
  }
  EXPECT_EQ(host.fake.retained_contexts, 0);
}

TEST(GpuRegistration, EveryChunkIsADmaBufOfItsOwn) {
  FakeOptions options = fake_fabric(1);
  options.devices[0].max_mr_size = 3 * kMiB;
  GpuHost host(options);
  const std::uint64_t memory = host.fake.allocate(6 * kMiB);
  const auto registration = host.pin({memory + 9, 5 * kMiB});
  EXPECT_EQ(registration->regions(), 3U);
  EXPECT_EQ(host.fake.dmabuf_mrs, 3U);
  ASSERT_EQ(host.fake.exports.size(), 3U);
  EXPECT_TRUE(host.fake.exports[1].contains(memory + 9 + 2 * kMiB, 2 * kMiB));
  EXPECT_TRUE(host.fake.exports[2].contains(memory + 9 + 4 * kMiB, kMiB));
}

TEST(GpuRegistration, MemlockDoesNotApply) {
  Ibverbs lib = FakeCuda::verbs_table();
  lib.memlock_limit = [] { return std::uint64_t{4096}; };
  GpuHost host(fake_fabric(1), lib);
  EXPECT_EQ(host.error({host.fake.allocate(kMiB), kMiB}), "");
}

/// Expandable segments of PyTorch refuse the attribute.
TEST(GpuRegistration, CopiesNeedNotBeSynchronous) {
  GpuHost host;
  host.fake.set_attribute_result = 801;
  EXPECT_EQ(host.error({host.fake.allocate(kMiB), kMiB}), "");
}

TEST(GpuRegistration, PeermemWhereThereIsNoDmaBuf) {
  GpuHost host;
  const MemoryRange range{host.fake.allocate(kMiB), kMiB};
  host.fake.attributes[cuda::kDmaBufSupported] = 0;
  EXPECT_EQ(host.error(range), "");
  host.fake.attributes[cuda::kDmaBufSupported] = 1;
  host.fake.export_result = 1;
  EXPECT_EQ(host.error(range), "");
  host.fake.export_result = cuda::kSuccess;
  host.fake.dmabuf_mr_error = EOPNOTSUPP;
  EXPECT_EQ(host.error(range), "");
  EXPECT_EQ(host.fake.dmabuf_mrs, 0U);
  EXPECT_EQ(host.fake.open_dmabufs(), 0U);
}

TEST(GpuRegistration, SaysWhyNeitherWayWent) {
  GpuHost host;
  const MemoryRange range{host.fake.allocate(kMiB), kMiB};
  const auto refusal = [&] {
    host.fabric.fail_next_reg_mr("rxe0", EFAULT);
    return host.error(range);
  };
  host.fake.dmabuf_mr_error = EOPNOTSUPP;
  const std::string error = refusal();
  EXPECT_TRUE(has_words(error, {"ibv_reg_mr(rxe0:1, 0x", "1048576 bytes of GPU 0 (Fake H100",
                                "EFAULT", "nvidia_peermem", "dma-buf is unavailable because",
                                "ibv_reg_dmabuf_mr: EOPNOTSUPP"}));
  host.fake.attributes[cuda::kDmaBufSupported] = 0;
  EXPECT_TRUE(has_words(refusal(), {"because GPU 0 (Fake H100", "DMA_BUF_SUPPORTED is 0"}));
  GpuHost old(fake_fabric(1), FakeFabric::table());
  old.fabric.fail_next_reg_mr("rxe0", EFAULT);
  EXPECT_TRUE(has_words(old.error({old.fake.allocate(kMiB), kMiB}), {"older than rdma-core 34"}));
}

TEST(GpuRegistration, RemediesNameBothWays) {
  EXPECT_TRUE(has_words(gpu_mr_remedy(false, "of X"),
                        {"nvidia_peermem is not loaded and dma-buf is unavailable because of X",
                         "modprobe nvidia_peermem", "open kernel modules"}));
  const std::string loaded = gpu_mr_remedy(true, "of X");
  EXPECT_TRUE(has_words(loaded, {"nvidia_peermem is loaded", "BAR1", "because of X"}));
  EXPECT_EQ(loaded.find("modprobe"), std::string::npos);
}

TEST(GpuRegistration, RefusesWhatPeersWritesWouldGetLostIn) {
  GpuHost host;
  const MemoryRange range{host.fake.allocate(kMiB), kMiB};
  host.fake.attributes[cuda::kGpuDirectRdmaWritesOrdering] = 0;
  EXPECT_EQ(host.pin(range)->gpu_to_flush()->device(), 0);
  EXPECT_EQ(host.pin(range, kGpuSource)->gpu_to_flush(), nullptr);
  host.fake.attributes[cuda::kGpuDirectRdmaFlushWritesOptions] = 2;
  EXPECT_TRUE(has_words(host.error(range), {"GPU 0", "read too early"}));
  EXPECT_EQ(host.error(range, kGpuSource), "");
  host.fake.attributes = {{cuda::kGpuDirectRdmaSupported, 0}, {cuda::kDmaBufSupported, 0}};
  EXPECT_TRUE(has_words(host.error(range, kGpuSource), {"GPU 0", "RDMA_SUPPORTED is 0"}));
}

constexpr std::size_t kBytes = 1 << 20;
constexpr RegionId kGpuRegion = 7;

/// Two hosts with a host buffer (region 0) and memory of a GPU (region 7) each.
struct GpuPair {
  explicit GpuPair(int ordering = 100, const EngineConfig& config = {})
      : fabric(fake_fabric(2)),
        a(fabric, {"rxe0"}, config, kBytes, FakeCuda::verbs_table(), &FakeCuda::table),
        b(fabric, {"rxe1"}, config, kBytes, FakeCuda::verbs_table(), &FakeCuda::table) {
    fake.attributes[cuda::kGpuDirectRdmaWritesOrdering] = ordering;
    const Bytes keys_a = add(a, gpu_a);
    const Bytes keys_b = add(b, gpu_b);
    const Bytes endpoint_a = a.backend.create_endpoint(1);
    const Bytes endpoint_b = b.backend.create_endpoint(1);
    a.backend.connect(1, link(b, endpoint_b, gpu_b, keys_b));
    b.backend.connect(1, link(a, endpoint_a, gpu_a, keys_a));
  }
  static Bytes add(BackendNode& node, std::uint64_t address) {
    const MemoryRange range{address, kBytes};
    return node.backend.register_memory(kGpuRegion, range, kGpuMemory,
                                        node.backend.pin_memory(range, kGpuMemory));
  }
  static PeerLink link(const BackendNode& node, const Bytes& endpoint, std::uint64_t address,
                       const Bytes& keys) {
    PeerLink link = link_to(node, endpoint);
    link.memory.push_back({{address, kBytes}, keys});  // The peer's region 1.
    return link;
  }
  void write(TransferId transfer, const std::vector<WriteSlice>& slices,
             std::optional<std::uint32_t> imm) {
    const Posted posted = a.backend.post_writes(1, transfer, slices, imm);
    ASSERT_EQ(posted.slices, slices.size());
    const bool told = !imm || posted.signalled || a.backend.post_signal(1, *imm);
    ASSERT_TRUE(told);
    ASSERT_TRUE(turn_until({&a, &b}, [&] {
      return a.seen[1].landed[transfer] == slices.size() && (!imm || !b.seen[1].imms.empty());
    }));
  }

  FakeCuda fake;
  std::uint64_t gpu_a = fake.allocate(kBytes, 0);
  std::uint64_t gpu_b = fake.allocate(kBytes, 1);
  CleanFabric fabric;
  BackendNode a;
  BackendNode b;
};

unsigned char* bytes_at(std::uint64_t address) { return reinterpret_cast<unsigned char*>(address); }

/// GPU to GPU, GPU to host and host to GPU, in one chain.
TEST(GpuTransfer, MemoryKindsMix) {
  GpuPair pair;
  for (std::size_t i = 0; i < kBytes; ++i) {
    bytes_at(pair.gpu_a)[i] = static_cast<unsigned char>(i * 7 / 5);
    pair.a.buffer[i] = static_cast<unsigned char>(i * 11 / 3);
  }
  const std::vector<WriteSlice> slices{{pair.gpu_a + 100, pair.gpu_b + 4096, 5000, kGpuRegion, 1},
                                       {pair.gpu_a, pair.b.address(300), 64, kGpuRegion, 0},
                                       {pair.a.address(50), pair.gpu_b + 70000, 64, 0, 1},
                                       {pair.a.address(9), pair.b.address(5000), 9999, 0, 0}};
  pair.write(1, slices, 5);
  for (const WriteSlice& slice : slices) {
    EXPECT_EQ(
        std::memcmp(bytes_at(slice.local_address), bytes_at(slice.remote_address), slice.nbytes),
        0);
  }
  EXPECT_EQ(pair.b.seen[1].imms, std::vector<std::uint32_t>{5});
  EXPECT_TRUE(pair.fake.flushed.empty());
  EXPECT_EQ(pair.b.count("verbs_gpu_flushes"), 0U);
}

/// The CPU copies what is sent inline, and it cannot read a GPU.
TEST(GpuTransfer, NeverSendsGpuMemoryInline) {
  GpuPair pair;
  pair.write(1, {{pair.gpu_a, pair.gpu_b, 64, kGpuRegion, 1}}, {});
  EXPECT_EQ(pair.fabric.counters("rxe0").inlined, 0U);
  // Gathered with host memory before or after it neither.
  pair.write(
      2,
      {{pair.a.address(0), pair.gpu_b, 64, 0, 1}, {pair.gpu_a, pair.gpu_b + 64, 64, kGpuRegion, 1}},
      {});
  pair.write(
      3,
      {{pair.gpu_a, pair.gpu_b, 64, kGpuRegion, 1}, {pair.a.address(0), pair.gpu_b + 64, 64, 0, 1}},
      {});
  EXPECT_EQ(pair.fabric.counters("rxe0").inlined, 0U);
  pair.write(4, {{pair.a.address(0), pair.gpu_b, 64, 0, 1}}, {});
  EXPECT_EQ(pair.fabric.counters("rxe0").inlined, 1U);
}

TEST(GpuTransfer, FlushesBeforeASignalIsReported) {
  GpuPair pair(0);
  pair.write(1, {{pair.gpu_a, pair.gpu_b, 4096, kGpuRegion, 1}}, {});
  EXPECT_TRUE(pair.fake.flushed.empty());  // Nobody was told.
  pair.write(2, {{pair.gpu_a, pair.gpu_b, 4096, kGpuRegion, 1}}, 5);
  EXPECT_EQ(pair.fake.flushed, std::vector<int>{1});  // The receiver's.
  EXPECT_EQ(pair.b.count("verbs_gpu_flushes"), 1U);
  EXPECT_EQ(pair.a.count("verbs_gpu_flushes"), 0U);
}

/// Signals that arrive together share one flush of each GPU.
TEST(GpuTransfer, FlushesEveryGpuOnce) {
  GpuPair pair(0);
  const MemoryRange more{pair.fake.allocate(kBytes, 1), kBytes};
  const MemoryRange other{pair.fake.allocate(kBytes, 0), kBytes};
  for (const auto& [region, range] : {std::pair(8U, more), std::pair(9U, other)}) {
    (void)pair.b.backend.register_memory(region, range, kGpuMemory,
                                         pair.b.backend.pin_memory(range, kGpuMemory));
  }
  ASSERT_TRUE(pair.a.backend.post_signal(1, 5));
  ASSERT_TRUE(pair.a.backend.post_signal(1, 6));
  ASSERT_TRUE(turn_until({&pair.a, &pair.b}, [&] { return pair.b.seen[1].imms.size() == 2; }));
  std::sort(pair.fake.flushed.begin(), pair.fake.flushed.end());
  EXPECT_EQ(pair.fake.flushed, (std::vector<int>{0, 1}));
  pair.fake.flushed.clear();
  for (const RegionId region : {kGpuRegion, 8U, 9U}) {
    (void)pair.b.backend.deregister_memory(region);
  }
  ASSERT_TRUE(pair.a.backend.post_signal(1, 7));
  ASSERT_TRUE(turn_until({&pair.a, &pair.b}, [&] { return pair.b.seen[1].imms.size() == 3; }));
  EXPECT_TRUE(pair.fake.flushed.empty());
}

TEST(GpuTransfer, AFailedFlushIsNoSignal) {
  GpuPair pair(0);
  pair.fake.flush_result = 719;
  ASSERT_TRUE(pair.a.backend.post_signal(1, 5));
  ASSERT_TRUE(turn_until({&pair.a, &pair.b}, [&] { return !pair.b.seen[1].errors.empty(); }));
  EXPECT_TRUE(
      has_words(pair.b.seen[1].errors.front(), {"cuFlushGPUDirectRDMAWrites", "kernel log"}));
  EXPECT_TRUE(pair.b.seen[1].imms.empty());
}

TEST(GpuTransfer, HostAddressesAreNoGpuMemory) {
  GpuPair pair;
  EXPECT_THROW((void)pair.a.backend.pin_memory(pair.a.range(), kGpuMemory), std::invalid_argument);
}

}  // namespace
}  // namespace rkv::verbs
