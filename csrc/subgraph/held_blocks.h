#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <utility>
#include <vector>

#include "subgraph/held_gate.h"
#include "subgraph/neuron_subgraph.h"

namespace neuron::subgraph {

/// A subgraph of a module together with the tensors that stand beside it in the module.
struct HeldBlock {
  SubgraphHandle subgraph;
  std::vector<at::Tensor> held;  ///< in the order of the specification
  /// Every name of each, as the state dict of the module searched has it, and its place in `held`.
  std::vector<std::pair<std::string, size_t>> names;
};

/// Every subgraph with held tensors in `module`, in the order of attributes: a module, or a tuple
/// of a prefix and a module, another prefix and its module, and so on. One that stands in the
/// module under two paths is there twice.
/// @throws std::runtime_error if a module has lost a tensor that it should hold.
std::vector<HeldBlock> find_held_blocks(const c10::IValue& module);

/// What a request that runs all of `blocks` takes at its outset, if it is to see one set of weights
/// in all of them.
std::vector<GateWish> request_gates(const std::vector<HeldBlock>& blocks);

}  // namespace neuron::subgraph
