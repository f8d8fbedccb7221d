#pragma once

#include <string>

#include "runtime/executable.h"

namespace neuron::subgraph {

/// Whether the inputs fit the specification.
bool inputs_fit(const runtime::Executable& executable, runtime::TensorRefs inputs);

/// What was expected and what came, or nothing if `tensor` is what `spec` says.
std::string misfit_of(const runtime::TensorSpec& spec, const at::Tensor& tensor);

/// Compares one input with what it has to be; `rule` ends the message.
/// @throws std::invalid_argument as `check_inputs`.
void check_input(const runtime::Executable& executable, const runtime::TensorSpec& spec,
                 const at::Tensor& input, const std::string& rule);

/// Compares `inputs` with the specification: count, definedness, layout, device, dtype and shape.
/// @throws std::invalid_argument naming the input, what was expected and what came.
void check_inputs(const runtime::Executable& executable, runtime::TensorRefs inputs);

}  // namespace neuron::subgraph
