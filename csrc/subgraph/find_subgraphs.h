#pragma once

#include <ATen/core/ivalue.h>

#include <vector>

#include "subgraph/neuron_subgraph.h"

namespace neuron::subgraph {

/// Every subgraph that `value` holds, each once, in the order of attributes: in attributes of a
/// module and its submodules, inside lists, tuples and dicts, and among the constants of methods,
/// where `torch.jit.freeze` puts them.
std::vector<SubgraphHandle> find_subgraphs(const c10::IValue& value);

}  // namespace neuron::subgraph
