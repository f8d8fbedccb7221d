#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/core_lock.h"
#include "runtime/settings.h"

namespace neuron::runtime {

/// The cores of this process, by their index on the machine; position is the index inside the
/// process. `lock` holds them against other processes where the settings ask for that.
struct VisibleCores {
  std::vector<int32_t> global_indices;
  CoreLock lock;
};

/// "3", "0-3", "0,1" and mixes, in the order written.
/// @throws std::runtime_error that says what was read and that the machine has `device_cores`.
std::vector<int32_t> parse_core_list(const std::string& text, int32_t device_cores);

/// Finds, and where asked reserves, the cores of this process.
/// @throws std::runtime_error for a bad setting, or naming the process that holds a core.
VisibleCores find_visible_cores(const Settings& settings, int32_t device_cores,
                                const std::string& device_name);

}  // namespace neuron::runtime
