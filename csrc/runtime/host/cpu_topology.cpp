#include "runtime/host/cpu_topology.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <thread>

namespace neuron::runtime::host {
namespace {

std::vector<int32_t> affinity_mask() {
  // The mask must be as large as the kernel's, which is not known beforehand.
  for (int32_t size = 1024; size <= 1 << 20; size *= 2) {
    cpu_set_t* set = CPU_ALLOC(size);
    const size_t bytes = CPU_ALLOC_SIZE(size);
    CPU_ZERO_S(bytes, set);
    std::vector<int32_t> cpus;
    if (sched_getaffinity(0, bytes, set) == 0) {
      for (int32_t cpu = 0; cpu < size; ++cpu) {
        if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
      }
    }
    CPU_FREE(set);
    if (!cpus.empty()) return cpus;
  }
  std::vector<int32_t> cpus(std::max(1U, std::thread::hardware_concurrency()));
  for (size_t i = 0; i < cpus.size(); ++i) cpus[i] = static_cast<int32_t>(i);
  return cpus;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

/// The smallest grant on the way from this process's cgroup to the root (version 2), or version
/// 1's.
std::optional<int32_t> cgroup_grant() {
  std::optional<int32_t> least;
  const auto consider = [&](std::optional<int32_t> grant) {
    if (grant && (!least || *grant < *least)) least = grant;
  };
  std::istringstream lines(read_file("/proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("0::", 0) != 0) continue;
    std::string folder = line.substr(3);
    while (true) {
      consider(parse_cpu_max(read_file("/sys/fs/cgroup" + folder + "/cpu.max")));
      const auto slash = folder.rfind('/');
      if (slash == std::string::npos || folder == "/") break;
      folder = folder.substr(0, slash);
    }
  }
  consider(parse_cpu_max(read_file("/sys/fs/cgroup/cpu.max")));
  const std::string v1 = "/sys/fs/cgroup/cpu/cpu.cfs_";
  consider(parse_cpu_max(read_file(v1 + "quota_us") + " " + read_file(v1 + "period_us")));
  return least;
}

}  // namespace

CpuBudget cpu_budget() {
  CpuBudget budget;
  budget.cpus = affinity_mask();
  budget.usable = static_cast<int32_t>(budget.cpus.size());
  if (const auto grant = cgroup_grant()) budget.usable = std::min(budget.usable, *grant);
  return budget;
}

std::optional<int32_t> parse_cpu_max(const std::string& text) {
  std::istringstream fields(text);
  double quota = 0;
  double period = 0;
  if (!(fields >> quota >> period) || quota <= 0 || period <= 0) return std::nullopt;
  const double cpus = quota / period;
  return std::max(1, static_cast<int32_t>(cpus) + (cpus > static_cast<int32_t>(cpus) ? 1 : 0));
}

std::vector<std::vector<int32_t>> share_cpus(const std::vector<int32_t>& cpus, int32_t core_count) {
  std::vector<std::vector<int32_t>> shares(core_count);
  const auto cpu_count = static_cast<int64_t>(cpus.size());
  for (int64_t core = 0; core < core_count; ++core) {
    if (core_count > cpu_count) {
      shares[core] = {cpus[core % cpu_count]};
      continue;
    }
    shares[core].assign(cpus.begin() + core * cpu_count / core_count,
                        cpus.begin() + (core + 1) * cpu_count / core_count);
  }
  return shares;
}

const std::vector<std::string>& cpu_features() {
  static const std::vector<std::string>& features = *new auto([] {
    std::istringstream lines(read_file("/proc/cpuinfo"));
    std::vector<std::string> names;
    for (std::string line; names.empty() && std::getline(lines, line);) {
      if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
      std::istringstream words(line.substr(line.find(':') + 1));
      for (std::string word; words >> word;) names.push_back(word);
    }
    std::sort(names.begin(), names.end());
    return names;
  }());
  return features;
}

}  // namespace neuron::runtime::host
