#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <utility>
#include <vector>

namespace neuron::subgraph {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// As `neuron::replace_weights` says. `module` is what `find_held_blocks` takes.
bool replace_weights(const c10::IValue& module, const NamedTensors& weights);

/// As `neuron::reset_state` says.
void reset_state(const c10::IValue& module);

}  // namespace neuron::subgraph
