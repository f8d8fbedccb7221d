#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "stub_backend.h"
#include "subgraph/operations.h"

namespace neuron::testing {

/// Tests of subgraphs on stub cores. Each takes one float32 tensor of shape [2] and gives one.
class OnStubSubgraphs : public OnStubCores {
 protected:
  using Handle = subgraph::SubgraphHandle;
  using Cores = std::vector<int64_t>;

  static Handle from_file(subgraph::Wishes wishes = {}) {
    return subgraph::NeuronSubgraph::from_file(make_state(wishes));
  }
  static Handle from_trace(subgraph::Wishes wishes = {}) {
    return subgraph::NeuronSubgraph::from_trace(make_state(wishes));
  }
  static auto status_of(const Handle& handle) { return subgraph::status({handle})[0]; }
  static std::string state_of(const Handle& handle) { return status_of(handle).state; }
  static Cores cores_of(const Handle& handle) { return status_of(handle).cores; }
  static float run(const Handle& handle, float value = 1) {
    return subgraph::forward({at::full({2}, value)}, handle)[0][0].item<float>();
  }
  /// The text of the std::runtime_error that `call` throws.
  template <typename Call>
  static std::string error_of(Call call) {
    try {
      call();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "nothing thrown";
  }
  static bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  }
};

}  // namespace neuron::testing
