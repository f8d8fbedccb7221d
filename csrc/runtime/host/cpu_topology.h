#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace neuron::runtime::host {

/// The CPUs this process may use: its affinity mask, and how much of them its cgroup grants.
struct CpuBudget {
  std::vector<int32_t> cpus;  ///< ascending, never empty
  int32_t usable = 1;         ///< CPUs' worth of time: cpus.size(), or less under a cgroup quota
};

CpuBudget cpu_budget();

/// CPUs' worth of time that a cgroup v2 "cpu.max" text grants, rounded up; nothing if unlimited or
/// not understood.
std::optional<int32_t> parse_cpu_max(const std::string& text);

/// The share of each of `core_count` cores: equal contiguous runs of `cpus`; where there are more
/// cores than CPUs, cores take turns at them.
std::vector<std::vector<int32_t>> share_cpus(const std::vector<int32_t>& cpus, int32_t core_count);

/// The ISA features of this machine's CPUs, as /proc/cpuinfo spells them.
const std::vector<std::string>& cpu_features();

}  // namespace neuron::runtime::host
