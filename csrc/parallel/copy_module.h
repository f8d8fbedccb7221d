#pragma once

#include <torch/csrc/jit/api/module.h>

namespace neuron::parallel {

/// A copy of `module` whose tensors are the module's own, and whose subgraphs share executables
/// with the module's but are not loaded.
/// @throws std::invalid_argument if the module is frozen: its subgraphs stand in its code, which
/// copies share.
torch::jit::Module copy_with_same_tensors(const torch::jit::Module& module);

}  // namespace neuron::parallel
