#pragma once

#include <torch/script.h>

#include <memory>
#include <sstream>
#include <string>

#include "stub_backend.h"

namespace neuron::testing {

/// forward(x) = neuron_ext::forward([x], self.subgraph)[0]. Built by hand: source given to
/// `define` knows no ops but torch's own.
inline void define_forward(torch::jit::Module& module) {
  const auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::Value* self = graph->addInput("self")->setType(module._ivalue()->type());
  torch::jit::Value* x = graph->addInput("x");
  torch::jit::Value* subgraph = graph->insertGetAttr(self, "subgraph");
  torch::jit::Value* inputs =
      graph->insertNode(graph->createList(c10::TensorType::get(), {x}))->output();
  const auto op = c10::Symbol::fromQualString("neuron_ext::forward");
  torch::jit::Value* outputs = graph->insert(op, {inputs, subgraph});
  graph->registerOutput(graph->insert(c10::aten::__getitem__, {outputs, 0}));
  const c10::QualifiedName name(*module.type()->name(), "forward");
  module.type()->addMethod(module._ivalue()->compilation_unit()->create_function(name, graph));
}

inline torch::jit::Module traced(const subgraph::Wishes& wishes = {}) {
  torch::jit::Module module("Traced");
  module.register_attribute("subgraph", c10::getCustomClassType<subgraph::SubgraphHandle>(),
                            c10::IValue(subgraph::NeuronSubgraph::from_trace(make_state(wishes))));
  define_forward(module);
  return module;
}

inline std::string saved(const torch::jit::Module& module) {
  std::ostringstream out;
  module.save(out);
  return out.str();
}

inline torch::jit::Module loaded(const std::string& bytes) {
  std::istringstream in(bytes);
  return torch::jit::load(in);
}

}  // namespace neuron::testing
