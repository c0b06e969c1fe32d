// SPDX-License-Identifier: Apache-2.0
#include "verbs/registration.h"

#include <algorithm>
#include <cerrno>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/error.h"

namespace rkv::verbs {
namespace {

constexpr std::uint64_t kHugePageBytes = 2 << 20;  ///< Chunk edges off it would waste entries.

constexpr const char* kMemlockRemedy =
    "raise the memlock limit: '* - memlock unlimited' in /etc/security/limits.conf for logins; "
    "for Slurm jobs 'LimitMEMLOCK=infinity' in slurmd's unit (systemctl edit slurmd) and "
    "'PropagateResourceLimitsExcept=MEMLOCK' in slurm.conf";

/// Relaxed ordering lets a NIC's PCIe writes pass each other, which some hosts need for full
/// speed. Completions stay ordered behind the data, and nothing here polls memory for it. The
/// flag is optional: a kernel or device that does not know it ignores it (ibv_reg_mr(3)).
unsigned access_flags(const MemoryUse& use) {
  return use.peer_writable ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE |
                                 static_cast<unsigned>(IBV_ACCESS_RELAXED_ORDERING)
                           : static_cast<unsigned>(IBV_ACCESS_RELAXED_ORDERING);
}

Handle<ibv_mr> register_chunk(const Rail& rail, const MemoryRange& chunk, unsigned access) {
  const Ibverbs& lib = rail.lib();
  void* address = reinterpret_cast<void*>(chunk.address);
  ibv_mr* mr = nullptr;
  if (lib.reg_mr_iova2 != nullptr) {
    mr = lib.reg_mr_iova2(rail.pd(), address, chunk.nbytes, chunk.address, access);
  } else {
    mr = (lib.reg_mr)(rail.pd(), address, chunk.nbytes,
                      static_cast<int>(access & ~unsigned{IBV_ACCESS_OPTIONAL_RANGE}));
  }
  if (mr == nullptr) {
    const int error = errno;
    std::ostringstream call;
    call << "ibv_reg_mr(" << rail.name() << ", 0x" << std::hex << chunk.address << ", " << std::dec
         << chunk.nbytes << " bytes)";
    throw_errno(call.str(), error,
                error == ENOMEM   ? kMemlockRemedy
                : error == EFAULT ? "the range is not mapped, or not by this process"
                                  : "see the kernel log");
  }
  return {mr, Release{&lib}};
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
                           std::uint64_t min_chunk_bytes, PinnedBytes& pinned)
    : range_(range),
      rails_(rails.size()),
      pinned_(pinned),
      chunk_bytes_(std::min(common_chunk_bytes(rails), range.nbytes)) {
  if (use.kind != MemoryKind::kHost) {
    throw std::invalid_argument(
        "register_memory(): GPU memory: this build of backend 'verbs' registers host memory only");
  }
  if (chunk_bytes_ < std::min(min_chunk_bytes, range.nbytes)) {
    throw std::runtime_error("register_memory(): the device registers at most " +
                             std::to_string(chunk_bytes_) + " bytes at once; set block_size to " +
                             std::to_string(chunk_bytes_) + " or less");
  }
  check_memlock(pinned_bytes(), pinned, rails.front()->lib().memlock_limit());
  for (const auto& rail : rails) {
    for (std::uint64_t done = 0; done < range.nbytes; done += chunk_bytes_) {
      const std::uint64_t nbytes = std::min(chunk_bytes_, range.nbytes - done);
      mrs_.push_back(register_chunk(*rail, {range.address + done, nbytes}, access_flags(use)));
    }
  }
  pinned_ += pinned_bytes();
}

Registration::~Registration() {
  mrs_.clear();
  pinned_ -= pinned_bytes();
}

RegionKeys Registration::keys(std::size_t rail, std::uint32_t ibv_mr::* key) const {
  RegionKeys keys{.base = range_.address, .chunk_bytes = chunk_bytes_};
  const std::size_t chunks = mrs_.size() / rails_;
  for (std::size_t i = 0; i < chunks; ++i) {
    keys.keys.push_back(mrs_[rail * chunks + i].get()->*key);
  }
  return keys;
}

}  // namespace rkv::verbs
