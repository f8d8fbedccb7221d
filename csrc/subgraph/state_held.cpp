#include "subgraph/state_held.h"

#include <ATen/ops/cat.h>
#include <c10/core/ScalarType.h>

#include <set>

namespace neuron::subgraph {
namespace {

using runtime::Executable;
using runtime::StateAlias;
using runtime::TensorSpec;

int64_t bytes_of(const TensorSpec& spec) {
  auto bytes = static_cast<int64_t>(c10::elementSize(spec.dtype));
  for (const int64_t size : spec.shape) bytes *= size;
  return bytes;
}

}  // namespace

void read_held(const StateReader& reader, Executable& executable) {
  const auto inputs = static_cast<int64_t>(executable.inputs.size());
  const auto outputs = static_cast<int64_t>(executable.outputs.size());
  executable.held_inputs = reader.integer("held_inputs", 0, 0, inputs);
  const int64_t users = inputs - executable.held_inputs;
  const auto check_held = [&](const char* field, int64_t input) {
    if (input < users || input >= inputs) {
      StateReader::reject(field, "names input ", input, ", expected ", users, " to ", inputs - 1);
    }
  };

  const auto tied_names = reader.texts("tied_names");
  const auto tied_inputs = reader.integers("tied_inputs");
  if (tied_names.size() != tied_inputs.size()) {
    StateReader::reject("tied_inputs", "has ", tied_inputs.size(), " entries, expected ",
                        tied_names.size());
  }
  for (size_t i = 0; i < tied_names.size(); ++i) {
    check_held("tied_inputs", tied_inputs[i]);
    executable.tied_names.emplace_back(tied_names[i], tied_inputs[i]);
  }

  const auto state_inputs = reader.integers("state_inputs");
  const auto state_outputs = reader.integers("state_outputs");
  const auto sizes = reader.integers("state_initial_sizes");
  const at::Tensor initial = reader.bytes("state_initial");
  for (const auto* list : {&state_outputs, &sizes}) {
    if (list->size() != state_inputs.size()) {
      StateReader::reject(list == &sizes ? "state_initial_sizes" : "state_outputs", "has ",
                          list->size(), " entries, expected ", state_inputs.size());
    }
  }
  std::set<int64_t> seen_inputs, seen_outputs;
  const int64_t held = initial.defined() ? initial.numel() : 0;
  int64_t at = 0;
  for (size_t i = 0; i < state_inputs.size(); ++i) {
    const int64_t input = state_inputs[i];
    const int64_t output = state_outputs[i];
    check_held("state_inputs", input);
    if (!seen_inputs.insert(input).second) {
      StateReader::reject("state_inputs", "names input ", input, " twice");
    }
    if (output < 0 || output >= outputs || !seen_outputs.insert(output).second) {
      StateReader::reject("state_outputs", "names output ", output, " of ", outputs,
                          ", or names it twice");
    }
    const TensorSpec& to = executable.inputs[static_cast<size_t>(input)];
    const TensorSpec& from = executable.outputs[static_cast<size_t>(output)];
    if (to.shape != from.shape || to.dtype != from.dtype) {
      StateReader::reject("state_outputs", "names output ", output,
                          ", which does not fit the state '", to.name, "'");
    }
    const auto element = static_cast<int64_t>(c10::elementSize(to.dtype));
    if ((sizes[i] != bytes_of(to) && sizes[i] != element) || sizes[i] > held - at) {
      StateReader::reject("state_initial_sizes", "does not fit the ", held,
                          " bytes of state_initial and the state '", to.name, "'");
    }
    executable.aliases.push_back(
        {input, output, initial.defined() ? initial.narrow(0, at, sizes[i]) : at::Tensor()});
    at += sizes[i];
  }
  if (at != held) {
    StateReader::reject("state_initial", "has ", held, " bytes, expected ", at);
  }
}

void write_held(const Executable& executable, State& state) {
  if (executable.held_inputs == 0) return;
  auto& [version, ints, strings, int_lists, string_lists, tensors] = state;
  ints.insert("held_inputs", executable.held_inputs);
  c10::List<std::string> tied_names;
  c10::List<int64_t> tied_inputs, inputs, outputs, sizes;
  for (const auto& [name, input] : executable.tied_names) {
    tied_names.push_back(name);
    tied_inputs.push_back(input);
  }
  string_lists.insert("tied_names", tied_names);
  int_lists.insert("tied_inputs", tied_inputs);
  std::vector<at::Tensor> initial;
  for (const StateAlias& alias : executable.aliases) {
    inputs.push_back(alias.input);
    outputs.push_back(alias.output);
    sizes.push_back(alias.initial.defined() ? alias.initial.numel() : 0);
    if (alias.initial.defined()) initial.push_back(alias.initial);
  }
  int_lists.insert("state_inputs", inputs);
  int_lists.insert("state_outputs", outputs);
  int_lists.insert("state_initial_sizes", sizes);
  if (!initial.empty()) tensors.insert("state_initial", at::cat(initial));
}

}  // namespace neuron::subgraph
