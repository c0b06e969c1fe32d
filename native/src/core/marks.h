// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace rkv {

/// Names a point in the work of a device's stream; 0 is always reached. Marks of one stream are
/// reached in their order and stay valid.
using Mark = std::uint64_t;

/// Tells when a device has come to a point of its work. Thread-safe.
class Marks {
 public:
  Marks() = default;
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;
  virtual ~Marks() = default;

  /// A mark behind all that `stream` (the driver's handle) was given by now. Does not block.
  /// @throw std::runtime_error
  [[nodiscard]] virtual Mark mark(std::uintptr_t stream) = 0;

  /// No call of the driver, so it may be polled beside a thread that launches kernels.
  [[nodiscard]] virtual bool reached(Mark mark) const = 0;
};

/// Of a host without devices.
class NoMarks final : public Marks {
 public:
  [[nodiscard]] Mark mark(std::uintptr_t stream) override;
  [[nodiscard]] bool reached(Mark /*mark*/) const override { return true; }
};

}  // namespace rkv
