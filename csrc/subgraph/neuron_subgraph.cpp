#include "subgraph/neuron_subgraph.h"

#include "placement/context.h"

namespace neuron::subgraph {

NeuronSubgraph::~NeuronSubgraph() {
  if (runtime::Runtime::lost_by_fork()) {
    // In a forked child, unloading could wait for a lock whose holder was not forked along.
    new std::shared_ptr<Subgraph>(std::move(subgraph_));
    return;
  }
  // Rather than leave it to the last reference, which a thread that has just loaded may hold.
  subgraph_->abandon();
}

namespace {

SubgraphHandle make(const State& state, Origin origin) {
  return c10::make_intrusive<NeuronSubgraph>(
      std::make_shared<Subgraph>(decode(state, origin), current_placement_context()));
}

}  // namespace

SubgraphHandle NeuronSubgraph::from_trace(const State& state) {
  return make(state, Origin::kTrace);
}

SubgraphHandle NeuronSubgraph::from_file(const State& state) {
  runtime::ExitGate::pass_load();
  auto handle = make(state, Origin::kFile);
  handle->get()->load_as_wished();
  runtime::ExitGate::pass_load();
  return handle;
}

}  // namespace neuron::subgraph
