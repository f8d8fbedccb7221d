#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace neuron {

/// What `status` tells of one subgraph.
struct SubgraphStatus {
  std::string name;
  std::string state;           ///< "unloaded", "loading", "loaded" or "failed"
  std::vector<int64_t> cores;  ///< visible cores it is loaded on, in round-robin order
  int32_t start_nc = -1;       ///< placement asked for; -1 is automatic
  int32_t nc_count = -1;
  bool lazy_load = false;
  bool async_load = false;
  bool dynamic_batch = false;
  std::vector<int64_t> executions;  ///< since the load, one count per entry of `cores`
  std::string error;                ///< of the last load or move that failed; else empty
  /// Those of `cores` that get no inferences now: the replica failed again and again while others
  /// did not, or an inference on the core ran past NEURON_RT_EXEC_TIMEOUT and has not come back.
  std::vector<int64_t> quarantined;
};

/// What `core_stats` tells of one visible core.
struct CoreStats {
  int32_t index = 0;          ///< inside this process
  int32_t global_index = 0;   ///< on this machine
  std::vector<int32_t> cpus;  ///< CPUs the core computes on
  int64_t models = 0;         ///< replicas loaded
  int64_t executions = 0;
  double busy_seconds = 0;
  bool quarantined = false;  ///< for a subgraph at least; see SubgraphStatus::quarantined
};

}  // namespace neuron
