#pragma once

#include "runtime/executable.h"

namespace neuron::subgraph {

/// Compares `inputs` with the specification: count, definedness, layout, device, dtype and shape.
/// @throws std::invalid_argument naming the input, what was expected and what came.
void check_inputs(const runtime::Executable& executable, runtime::TensorRefs inputs);

}  // namespace neuron::subgraph
