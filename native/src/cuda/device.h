// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "cuda/driver.h"

namespace rkv::cuda {

/// One GPU and its primary context, the one that PyTorch works in.
class Gpu {
 public:
  /// @throw std::runtime_error
  Gpu(const Cuda& cuda, int ordinal);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  [[nodiscard]] const Cuda& cuda() const { return cuda_; }
  [[nodiscard]] Device device() const { return device_; }
  [[nodiscard]] Context context() const { return context_; }
  [[nodiscard]] int attribute(DeviceAttribute attribute) const;
  [[nodiscard]] Uuid uuid() const;
  /// "GPU 0 (NVIDIA H100 80GB HBM3, 0000:3b:00.0)".
  [[nodiscard]] std::string text() const;

 private:
  const Cuda& cuda_;
  const int ordinal_;
  Device device_ = 0;
  Context context_ = nullptr;
};

/// The GPU that is current on the calling thread, else the first.
/// @throw std::runtime_error when the driver or a GPU is missing.
[[nodiscard]] std::shared_ptr<const Gpu> current_gpu();

/// The device that `address` is on. @throw std::invalid_argument if it is not device memory.
[[nodiscard]] int device_of(const Cuda& cuda, DevicePtr address);

}  // namespace rkv::cuda
