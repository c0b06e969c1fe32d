// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "core/regions.h"
#include "cuda/device.h"
#include "verbs/rail.h"

namespace rkv::verbs {

constexpr const char* kMemlockRemedy =
    "raise the memlock limit: '* - memlock unlimited' in /etc/security/limits.conf for logins; "
    "for Slurm jobs 'LimitMEMLOCK=infinity' in slurmd's unit (systemctl edit slurmd) and "
    "'PropagateResourceLimitsExcept=MEMLOCK' in slurm.conf";

/// Registers host memory on a rail. @throw std::runtime_error with call, errno and remedy.
[[nodiscard]] Handle<ibv_mr> register_host_mr(const Rail& rail, const MemoryRange& range,
                                              unsigned access);

/// Registers memory of `gpu`: as a dma-buf if the driver, the GPU and the NIC can, else through
/// the nvidia_peermem module. @throw std::runtime_error with why neither went and the remedy.
[[nodiscard]] Handle<ibv_mr> register_gpu_mr(const Rail& rail, const MemoryRange& range,
                                             unsigned access, const cuda::Gpu& gpu);

/// What to do when neither way to GPU memory went. `dmabuf_fault`: why not as a dma-buf.
[[nodiscard]] std::string gpu_mr_remedy(bool has_peermem, const std::string& dmabuf_fault);

}  // namespace rkv::verbs
