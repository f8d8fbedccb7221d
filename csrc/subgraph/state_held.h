#pragma once

#include "subgraph/state_reader.h"

namespace neuron::subgraph {

/// The fields of held tensors: how many there are, the names that share one, and the state. All
/// are optional; without them the module holds nothing.
/// @throws as `decode`. The inputs and outputs of `executable` have been read.
void read_held(const StateReader& reader, runtime::Executable& executable);

/// Adds them to `state`, if anything is held.
void write_held(const runtime::Executable& executable, State& state);

}  // namespace neuron::subgraph
