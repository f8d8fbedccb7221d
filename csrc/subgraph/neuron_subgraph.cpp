#include "subgraph/neuron_subgraph.h"

#include "placement/context.h"

namespace neuron::subgraph {

NeuronSubgraph::~NeuronSubgraph() {
  // In a forked child, unloading could wait for a lock whose holder was not forked along.
  if (runtime::Runtime::lost_by_fork()) new std::shared_ptr<Subgraph>(std::move(subgraph_));
}

SubgraphHandle NeuronSubgraph::from_trace(const State& state) {
  return c10::make_intrusive<NeuronSubgraph>(
      std::make_shared<Subgraph>(decode(state), current_placement_context()));
}

SubgraphHandle NeuronSubgraph::from_file(const State& state) {
  auto handle = from_trace(state);
  handle->get()->load_as_wished();
  return handle;
}

}  // namespace neuron::subgraph
