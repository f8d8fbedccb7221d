#pragma once

#include <string>
#include <vector>

#include "dice.h"
#include "subgraph/state.h"

namespace neuron::fuzz {

/// A state that is right, to make wrong ones of.
struct Base {
  std::string name;
  subgraph::State state;
};

/// States of each kind: portable, portable with held tensors, native with and without a portable
/// graph. The native code is `carried_library`. None of them may map it: they are for another
/// machine, or the digest of the code is wrong.
std::vector<Base> base_states(const at::Tensor& carried_library);

/// A native state that may be loaded: nothing but the code itself is wrong with it.
subgraph::State loadable_native_state(const at::Tensor& carried_library);

/// A copy whose lists may be changed. Tensors are shared.
subgraph::State copy_of(const subgraph::State& state);

/// Spoils some fields: drops, renames, duplicates, resizes, retypes, or sets values.
void mutate(subgraph::State& state, Dice& dice);

/// Makes the digest of the fields right again; with `contents`, also those of weights and graph.
/// Never that of the code: whoever can write that decides what runs.
void mend_digests(subgraph::State& state, bool contents);

/// Where a decoded state, encoded again, differs from what was decoded. Empty if nowhere: fields
/// that have no meaning are left out, those that are optional are there.
std::string difference(const subgraph::State& before, const subgraph::State& after);

}  // namespace neuron::fuzz
