// SPDX-License-Identifier: Apache-2.0
#include "verbs/chain_builder.h"

#include <arpa/inet.h>

#include <algorithm>

namespace rkv::verbs {

ChainBuilder::ChainBuilder() : wr_{}, sge_{} {}

std::size_t ChainBuilder::build(std::span<const WriteSlice> slices, const KeysByRegion& local,
                                const KeysByRegion& remote, const ChainLimits& limits) {
  wrs_ = 0;
  sges_ = 0;
  nbytes_ = 0;
  const RegionKeys* local_keys = nullptr;
  const RegionKeys* remote_keys = nullptr;
  std::size_t taken = 0;
  for (; taken < slices.size(); ++taken) {
    const WriteSlice& slice = slices[taken];
    if (nbytes_ >= limits.nbytes || limits.wrs - wrs_ < kMaxWrsPerSlice) break;
    // Rows mostly stay in one region; the map is asked only when they leave it.
    if (taken == 0 || slice.local_region != slices[taken - 1].local_region) {
      local_keys = &local.at(slice.local_region);
    }
    if (taken == 0 || slice.remote_region != slices[taken - 1].remote_region) {
      remote_keys = &remote.at(slice.remote_region);
    }
    add_slice(slice, *local_keys, *remote_keys, limits);
  }
  return taken;
}

void ChainBuilder::add_slice(const WriteSlice& slice, const RegionKeys& local,
                             const RegionKeys& remote, const ChainLimits& limits) {
  for (std::uint64_t done = 0; done < slice.nbytes;) {
    const std::uint64_t from = slice.local_address + done;
    const std::uint64_t to = slice.remote_address + done;
    const std::uint64_t piece =
        std::min({slice.nbytes - done, local.same_key_bytes(from), remote.same_key_bytes(to)});
    add_piece({.addr = from, .length = static_cast<std::uint32_t>(piece), .lkey = local.key(from)},
              local.cpu_readable, to, remote.key(to), limits);
    done += piece;
  }
}

void ChainBuilder::add_piece(const ibv_sge& piece, bool cpu_readable, std::uint64_t remote_address,
                             std::uint32_t rkey, const ChainLimits& limits) {
  const bool gathers = wrs_ > 0 && remote_address == last_.end && rkey == last_.rkey &&
                       static_cast<std::uint32_t>(wr_[wrs_ - 1].num_sge) < limits.sges &&
                       last_.nbytes + piece.length <= limits.wr_bytes;
  if (gathers) {
    ++wr_[wrs_ - 1].num_sge;
    last_.nbytes += piece.length;
    last_.cpu_readable &= cpu_readable;
  } else {
    ibv_send_wr& wr = wr_[wrs_++];
    wr.sg_list = &sge_[sges_];
    wr.num_sge = 1;
    wr.opcode = IBV_WR_RDMA_WRITE;
    wr.wr.rdma.remote_addr = remote_address;
    wr.wr.rdma.rkey = rkey;
    last_.nbytes = piece.length;
    last_.cpu_readable = cpu_readable;
    last_.rkey = rkey;
  }
  const bool fits = last_.nbytes <= limits.inline_bytes && last_.cpu_readable;
  wr_[wrs_ - 1].send_flags = fits ? static_cast<unsigned>(IBV_SEND_INLINE) : 0U;
  last_.end = remote_address + piece.length;
  sge_[sges_++] = piece;
  nbytes_ += piece.length;
}

ibv_send_wr* ChainBuilder::finish(std::uint64_t wr_id, std::optional<std::uint32_t> imm) {
  for (std::uint32_t i = 0; i < wrs_; ++i) {
    wr_[i].wr_id = wr_id;
    wr_[i].next = i + 1 < wrs_ ? &wr_[i + 1] : nullptr;
  }
  ibv_send_wr& last = wr_[wrs_ - 1];
  last.send_flags |= IBV_SEND_SIGNALED;
  if (imm) {
    last.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    last.imm_data = htonl(*imm);
  }
  return wr_.data();
}

}  // namespace rkv::verbs
