// SPDX-License-Identifier: Apache-2.0
/// The one place that knows every backend.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/config.h"
#include "core/marks.h"

namespace rkv {

struct BackendInfo {
  std::string name;
  bool usable = false;
  std::string reason;  ///< What it would use, or what is missing.
};

/// Looks for libraries and devices on this host; opens nothing for good.
[[nodiscard]] std::vector<BackendInfo> probe_backends();

/// The backend that `config` names, the best usable one for "auto".
/// @throw std::invalid_argument for an unknown name, std::runtime_error with the reason when the
/// backend is not usable here.
[[nodiscard]] std::unique_ptr<Backend> create_backend(const EngineConfig& config);

/// Marks of the streams of the GPU that is current where the first is made.
[[nodiscard]] std::unique_ptr<Marks> create_marks();

}  // namespace rkv
