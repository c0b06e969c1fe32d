// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"

#include <array>
#include <stdexcept>

namespace rkv::cuda {

Gpu::Gpu(const Cuda& cuda, int ordinal) : cuda_(cuda), ordinal_(ordinal) {
  const std::string number = std::to_string(ordinal);
  check(cuda, cuda.device_get(&device_, ordinal), "cuDeviceGet(" + number + ")");
  check(cuda, cuda.device_primary_ctx_retain(&context_, device_),
        "cuDevicePrimaryCtxRetain(" + number + ")",
        "see nvidia-smi: is the GPU's compute mode exclusive, or its memory full?");
}

Gpu::~Gpu() { cuda_.device_primary_ctx_release(device_); }

int Gpu::attribute(DeviceAttribute attribute) const {
  int value = 0;
  check(cuda_, cuda_.device_get_attribute(&value, attribute, device_),
        "cuDeviceGetAttribute(" + std::to_string(attribute) + ")");
  return value;
}

Uuid Gpu::uuid() const {
  Uuid uuid{};
  check(cuda_, cuda_.device_get_uuid(&uuid, device_), "cuDeviceGetUuid()");
  return uuid;
}

std::string Gpu::text() const {
  std::array<char, 96> name{};
  std::array<char, 32> bus{};
  cuda_.device_get_name(name.data(), static_cast<int>(name.size()), device_);
  cuda_.device_get_pci_bus_id(bus.data(), static_cast<int>(bus.size()), device_);
  return "GPU " + std::to_string(ordinal_) + " (" + name.data() + ", " + bus.data() + ")";
}

std::shared_ptr<const Gpu> current_gpu() {
  const Cuda& cuda = load_cuda();
  int count = 0;
  check(cuda, cuda.device_get_count(&count), "cuDeviceGetCount()");
  if (count == 0) {
    throw std::runtime_error("no GPU is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES");
  }
  Device current = 0;
  Context context = nullptr;
  if (cuda.ctx_get_current(&context) == kSuccess && context != nullptr) {
    check(cuda, cuda.ctx_get_device(&current), "cuCtxGetDevice()");
  }
  return std::make_shared<const Gpu>(cuda, current);
}

int device_of(const Cuda& cuda, DevicePtr address) {
  unsigned type = 0;
  int ordinal = 0;
  if (cuda.pointer_get_attribute(&type, kPointerMemoryType, address) != kSuccess ||
      type != kMemoryTypeDevice) {
    throw std::invalid_argument("register_memory(): " + std::to_string(address) +
                                " is not the address of GPU memory");
  }
  check(cuda, cuda.pointer_get_attribute(&ordinal, kPointerDeviceOrdinal, address),
        "cuPointerGetAttribute()");
  return ordinal;
}

}  // namespace rkv::cuda
