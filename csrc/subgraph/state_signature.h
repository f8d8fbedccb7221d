#pragma once

#include "subgraph/state_reader.h"

namespace neuron::subgraph {

/// Sets the signature of `executable` if `state` has one. Does not judge it.
/// @param state known to be sound.
/// @throws as `decode`.
void read_signature(const State& state, const StateReader& reader,
                    const runtime::Executable& executable);

/// Adds the signature to `state`, which has all other fields, if it is one for these fields. It is
/// not where a later version signed fields that this one does not know, which is logged.
void write_signature(const runtime::Executable& executable, State& state);

}  // namespace neuron::subgraph
