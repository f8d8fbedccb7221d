#pragma once

#include <cstdint>
#include <vector>

#include "runtime/executable.h"

namespace neuron::subgraph {

/// Dynamic batching along dimension 0: a batch of any size as chunks of the size that the
/// executable was compiled for.

/// @throws std::invalid_argument if not every input and output has the same size in dimension 0,
/// or if inputs are updated in place: what stands in the way.
void check_batchable(const runtime::Executable& executable);

/// Whether the inputs are what `executable` takes but for one and the same other size in dimension
/// 0; that size.
/// @throws std::invalid_argument naming the input, what was expected and what came.
int64_t check_batch(const runtime::Executable& executable, runtime::TensorRefs inputs);

/// Rows `begin` to `begin + chunk size - 1` of each input, dense. Past the last row its values are
/// repeated: zeros could be values that the model never meant to take. Held inputs go along whole.
runtime::Tensors chunk_of(const runtime::Executable& executable, runtime::TensorRefs inputs,
                          int64_t begin);

/// How many rows one chunk has: what the executable was compiled for.
int64_t chunk_rows(const runtime::Executable& executable);

/// The outputs of all chunks as one batch of `rows` rows, in tensors of its own; what padding gave
/// is left out.
runtime::Tensors join_chunks(const runtime::Executable& executable,
                             const std::vector<runtime::Tensors>& chunks, int64_t rows);

}  // namespace neuron::subgraph
