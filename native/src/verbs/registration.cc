// SPDX-License-Identifier: Apache-2.0
#include "verbs/registration.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/visibility.h"
#include "verbs/memory_region.h"

namespace rkv::verbs {
namespace {

constexpr std::uint64_t kHugePageBytes = 2 << 20;  ///< Chunk edges off it would waste entries.

/// Relaxed ordering lets a NIC's PCIe writes pass each other, which some hosts need for full
/// speed. Completions stay ordered behind the data, and nothing here polls memory for it. The
/// flag is optional: a kernel or device that does not know it ignores it (ibv_reg_mr(3)).
///
/// For GPU memory too. Data and completion go to different places there, so no flag of the data
/// orders them at their ends. What does is that a strictly ordered write stays behind the data that
/// was ahead of it: the completion as far as their ways are one, and from there on the CPU's next
/// submission to the GPU, which is made after the completion was seen, or, where the GPU says that
/// this is not enough, the read of a flush (cuda/visibility.h). Only a kernel that was running
/// before could tell the difference, and none looks for data here.
unsigned access_flags(const MemoryUse& use) {
  return use.peer_writable ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE |
                                 static_cast<unsigned>(IBV_ACCESS_RELAXED_ORDERING)
                           : static_cast<unsigned>(IBV_ACCESS_RELAXED_ORDERING);
}

std::uint64_t common_chunk_bytes(const std::vector<std::shared_ptr<Rail>>& rails) {
  std::uint64_t nbytes = UINT64_MAX;
  for (const auto& rail : rails) nbytes = std::min(nbytes, rail->limits().max_mr_size);
  return nbytes > kHugePageBytes ? nbytes - nbytes % kHugePageBytes : nbytes;
}

}  // namespace

void check_memlock(std::uint64_t nbytes, std::uint64_t pinned, std::uint64_t limit) {
  if (nbytes <= limit && pinned <= limit - nbytes) return;
  throw std::runtime_error("register_memory(): " + std::to_string(nbytes) +
                           " bytes to pin, and the memlock limit (ulimit -l) is " +
                           std::to_string(limit) + " bytes, of which this engine has pinned " +
                           std::to_string(pinned) + "; " + kMemlockRemedy);
}

Registration::Registration(const std::vector<std::shared_ptr<Rail>>& rails,
                           const MemoryRange& range, const MemoryUse& use,
                           std::uint64_t min_chunk_bytes, PinnedBytes& pinned,
                           std::shared_ptr<const cuda::Gpu> gpu)
    : range_(range),
      rails_(rails.size()),
      pinned_(pinned),
      gpu_(std::move(gpu)),
      chunk_bytes_(std::min(common_chunk_bytes(rails), range.nbytes)) {
  if (gpu_ != nullptr) prepare_gpu(use);
  if (chunk_bytes_ < std::min(min_chunk_bytes, range.nbytes)) {
    throw std::runtime_error("register_memory(): the device registers at most " +
                             std::to_string(chunk_bytes_) + " bytes at once; set block_size to " +
                             std::to_string(chunk_bytes_) + " or less");
  }
  if (gpu_ == nullptr) {
    check_memlock(pinned_bytes(), pinned, rails.front()->lib().memlock_limit());
  }
  for (const auto& rail : rails) {
    for (std::uint64_t done = 0; done < range.nbytes; done += chunk_bytes_) {
      const std::uint64_t nbytes = std::min(chunk_bytes_, range.nbytes - done);
      const MemoryRange chunk{range.address + done, nbytes};
      mrs_.push_back(gpu_ == nullptr ? register_host_mr(*rail, chunk, access_flags(use))
                                     : register_gpu_mr(*rail, chunk, access_flags(use), *gpu_));
    }
  }
  pinned_ += pinned_bytes();
}

void Registration::prepare_gpu(const MemoryUse& use) {
  const cuda::RdmaAttributes attributes = cuda::read_rdma_attributes(*gpu_);
  if (!attributes.supported) {
    throw std::runtime_error("register_memory(): " + gpu_->text() +
                             " lets no NIC at its memory (CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_"
                             "SUPPORTED is 0); GPUs for data centres and workstations do");
  }
  needs_flush_ = use.peer_writable && cuda::needs_flush(attributes, gpu_->text());
  cuda::make_copies_synchronous(*gpu_, range_.address);
}

Registration::~Registration() {
  mrs_.clear();
  pinned_ -= pinned_bytes();
}

RegionKeys Registration::keys(std::size_t rail, std::uint32_t ibv_mr::* key) const {
  RegionKeys keys{
      .base = range_.address, .chunk_bytes = chunk_bytes_, .cpu_readable = gpu_ == nullptr};
  const std::size_t chunks = mrs_.size() / rails_;
  for (std::size_t i = 0; i < chunks; ++i) {
    keys.keys.push_back(mrs_[rail * chunks + i].get()->*key);
  }
  return keys;
}

}  // namespace rkv::verbs
