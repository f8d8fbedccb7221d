#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace neuron::parallel {

/// `neuron::data_parallel`, as include/neuron_ext/data_parallel.h says.
torch::jit::Module make_parallel(torch::jit::Module model,
                                 const std::optional<std::vector<int64_t>>& device_ids, int64_t dim,
                                 bool dynamic_batching);

/// How a call is cut; attributes of the module that `make_parallel` makes.
struct Cut {
  int64_t dim = 0;
  int64_t cores = 1;
  int64_t split_size = 0;      ///< rows of a chunk; 0: the batch divided by the number of cores
  int64_t traced_rows = 0;     ///< with dynamic batching: rows that the model was traced with, or 0
  int64_t workers = 1;         ///< threads that work on one call
  bool holds_tensors = false;  ///< weights that can be replaced: a call sees one set of them
};

/// The forward of such a module.
/// @param models (module, number of its cores) for each run of consecutive cores.
/// @param names of the arguments.
c10::IValue forward_parallel(const std::vector<torch::jit::Module>& models,
                             const std::vector<int64_t>& cores_of_models,
                             std::vector<c10::IValue> arguments,
                             const std::vector<std::string>& names, const Cut& cut);

void disable_dynamic_batching(torch::jit::Module& parallel);

}  // namespace neuron::parallel
