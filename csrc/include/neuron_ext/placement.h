#pragma once

#include <neuron_ext/export.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>

/// Placement of traced modules on NeuronCores. The C++ counterpart of
/// `neuron_ext.set_neuron_cores`, `set_multicore`, `neuron_cores_context` and `multicore_context`.
///
/// Core indices are relative to the cores visible to this process: 0..visible_core_count()-1.
/// Errors: std::invalid_argument for a placement that does not fit the visible cores,
/// std::runtime_error when the runtime cannot be initialised or a load fails. After an error the
/// module runs where it ran before.
namespace neuron {

/// Moves every subgraph of `module`, live, to `nc_count` cores from `start_nc` on.
/// -1 means automatic: the least used cores, and one core. `nc_count` > 1 replicates.
/// All subgraphs move, or none. Requests in flight finish on the old cores.
/// A subgraph whose async flag is set moves in the background; its next forward waits for that.
/// Does nothing to a module without subgraphs. Thread-safe.
NEURON_EXT_API void set_neuron_cores(torch::jit::Module& module, int32_t start_nc = -1,
                                     int32_t nc_count = -1);

/// Replicates every subgraph of `module` onto all visible cores. Thread-safe.
NEURON_EXT_API void set_multicore(torch::jit::Module& module);

/// While it lives, `torch::jit::load` on this thread places subgraphs as given. Guards nest; other
/// threads never see them. Construct and destroy on the same thread, innermost first.
class NEURON_EXT_API NeuronCoresGuard {
 public:
  explicit NeuronCoresGuard(int32_t start_nc = -1, int32_t nc_count = -1);
  ~NeuronCoresGuard();
  NeuronCoresGuard(const NeuronCoresGuard&) = delete;
  NeuronCoresGuard& operator=(const NeuronCoresGuard&) = delete;

 private:
  int64_t token_;
};

/// A NeuronCoresGuard over all visible cores.
class NEURON_EXT_API MulticoreGuard {
 public:
  MulticoreGuard();

 private:
  NeuronCoresGuard guard_;
};

}  // namespace neuron
