#pragma once

#include <torch/custom_class.h>

#include <memory>
#include <vector>

#include "subgraph/subgraph.h"

namespace neuron::subgraph {

/// `torch.classes.neuron_ext.NeuronSubgraph`: a Subgraph as TorchScript holds it.
class NeuronSubgraph : public torch::CustomClassHolder {
 public:
  explicit NeuronSubgraph(std::shared_ptr<Subgraph> subgraph) : subgraph_(std::move(subgraph)) {}
  ~NeuronSubgraph() override;

  /// A fresh trace: takes the placement context along, and loads at its first use.
  static c10::intrusive_ptr<NeuronSubgraph> from_trace(const State& state);

  /// `__setstate__`: takes the placement context along, and loads as the saved flags say.
  static c10::intrusive_ptr<NeuronSubgraph> from_file(const State& state);

  /// `__getstate__`.
  State state() const { return encode(subgraph_->executable(), subgraph_->wishes()); }

  const std::shared_ptr<Subgraph>& get() const { return subgraph_; }

 private:
  std::shared_ptr<Subgraph> subgraph_;
};

using SubgraphHandle = c10::intrusive_ptr<NeuronSubgraph>;

}  // namespace neuron::subgraph
