#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "runtime/executable.h"
#include "subgraph/held_gate.h"

namespace neuron::subgraph {

/// The gate before a set of held tensors, found by the storage of the first of them: modules that
/// hold the same tensors in the same order share it, a copy of a module has its own.
/// @param first defined, with a storage.
std::shared_ptr<HeldGate> gate_of(const at::Tensor& first);

/// How requests pass the gate: exclusively if they leave a new state.
HeldGate::Mode request_mode(const runtime::Executable& executable);

/// Compares held tensors with the specification, before anything reads them: in Python anybody can
/// put others in their place.
/// @throws std::invalid_argument naming the tensor, what was expected and what is there.
void check_held(const runtime::Executable& executable, runtime::TensorRefs held);

/// Whether two tensors have bytes in common, for all that their storages tell.
bool share_storage(const at::Tensor& one, const at::Tensor& other);

struct TensorCopy {
  at::Tensor to;
  at::Tensor from;
};

/// Copies in place, on several threads where there is much. Each pair has one shape and dtype, no
/// `from` shares storage with another pair's `to`. Does not fail: nothing is allocated where both
/// are dense.
void copy_in_place(const std::vector<TensorCopy>& copies);

/// What follows a successful inference: outputs that are views of held tensors become the caller's
/// own, and the aliased ones are copied into the state.
/// @throws std::runtime_error if an aliased output does not fit; the state is as it was then.
void finish_held(const runtime::Executable& executable, runtime::TensorRefs held,
                 runtime::Tensors& outputs);

/// Puts the initial values of the state into `held`.
void reset_held(const runtime::Executable& executable, runtime::TensorRefs held);

}  // namespace neuron::subgraph
