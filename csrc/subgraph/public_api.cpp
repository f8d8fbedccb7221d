// The functions of include/neuron_ext/: modules in, subgraphs out, the rest is `operations`.
#include <neuron_ext/placement.h>
#include <neuron_ext/runtime.h>
#include <neuron_ext/weights.h>

#include "placement/context.h"
#include "subgraph/find_subgraphs.h"
#include "subgraph/operations.h"
#include "subgraph/replace_weights.h"

namespace neuron {
namespace {

subgraph::Subgraphs subgraphs_of(const torch::jit::Module& module) {
  return subgraph::find_subgraphs(module._ivalue());
}

}  // namespace

void set_neuron_cores(torch::jit::Module& module, int32_t start_nc, int32_t nc_count) {
  subgraph::set_neuron_cores(subgraphs_of(module), start_nc, nc_count);
}

void set_multicore(torch::jit::Module& module) {
  subgraph::set_multicore(subgraphs_of(module));
}

NeuronCoresGuard::NeuronCoresGuard(int32_t start_nc, int32_t nc_count)
    : token_(subgraph::enter_neuron_cores_context(start_nc, nc_count)) {}

NeuronCoresGuard::~NeuronCoresGuard() {
  try {
    exit_placement_context(token_);
  } catch (const std::invalid_argument&) {
    // Destroyed on another thread than made: that thread's context stays, this one has none.
  }
}

MulticoreGuard::MulticoreGuard() : guard_(0, visible_core_count()) {}

void lazy_load(torch::jit::Module& module, bool enable) {
  subgraph::set_lazy_load(subgraphs_of(module), enable);
}

void async_load(torch::jit::Module& module, bool enable) {
  subgraph::set_async_load(subgraphs_of(module), enable);
}

void dynamic_batch(torch::jit::Module& module, bool enable) {
  subgraph::set_dynamic_batch(subgraphs_of(module), enable);
}

bool replace_weights(torch::jit::Module& module,
                     const std::unordered_map<std::string, at::Tensor>& weights) {
  return subgraph::replace_weights(module._ivalue(), {weights.begin(), weights.end()});
}

void reset_state(torch::jit::Module& module) {
  subgraph::reset_state(module._ivalue());
}

std::vector<SubgraphStatus> status(const torch::jit::Module& module) {
  return subgraph::status(subgraphs_of(module));
}

bool wait(const torch::jit::Module& module, std::optional<std::chrono::duration<double>> timeout) {
  std::optional<double> seconds;
  if (timeout) seconds = timeout->count();
  return subgraph::wait(subgraphs_of(module), seconds);
}

void unload(torch::jit::Module& module) {
  subgraph::unload(subgraphs_of(module));
}

int32_t visible_core_count() {
  return static_cast<int32_t>(subgraph::visible_core_count());
}

std::vector<CoreStats> core_stats() {
  return subgraph::core_stats();
}

}  // namespace neuron
