#include "subgraph/batch.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <stdexcept>

#include "common/message.h"
#include "subgraph/input_check.h"

namespace neuron::subgraph {

using runtime::Executable;
using runtime::TensorRefs;
using runtime::Tensors;
using runtime::TensorSpec;

namespace {

[[noreturn]] void refuse(const Executable& executable, const std::string& why) {
  throw std::invalid_argument(message("subgraph '", executable.name,
                                      "' cannot take batches of any size: ", why,
                                      ". Dynamic batching needs the batch as dimension 0 of every "
                                      "input and output"));
}

}  // namespace

void check_batchable(const Executable& executable) {
  if (executable.user_inputs() == 0) refuse(executable, "it has no inputs");
  if (!executable.aliases.empty()) {
    const auto index = static_cast<size_t>(executable.aliases.front().input);
    refuse(executable, message("it has the state '", executable.inputs[index].name,
                               "', which every chunk would change"));
  }
  if (!executable.mutated_inputs.empty()) {
    const auto index = static_cast<size_t>(executable.mutated_inputs.front());
    refuse(executable, message("it updates its input '", executable.inputs[index].name, "'"));
  }
  for (size_t i = 0; i < executable.user_inputs(); ++i) {
    const TensorSpec& spec = executable.inputs[i];
    if (spec.shape.empty()) refuse(executable, message("its input '", spec.name, "' has none"));
    if (spec.shape[0] == 0) refuse(executable, message("its input '", spec.name, "' is empty"));
    if (spec.shape[0] != chunk_rows(executable)) {
      refuse(executable,
             message("its inputs '", executable.inputs[0].name, "' and '", spec.name, "' have ",
                     chunk_rows(executable), " and ", spec.shape[0], " rows"));
    }
  }
  for (size_t i = 0; i < executable.outputs.size(); ++i) {
    const auto& shape = executable.outputs[i].shape;
    if (shape.empty() || shape[0] != chunk_rows(executable)) {
      refuse(executable, message("its output ", i, " has shape [", join(shape),
                                 "], and its inputs ", chunk_rows(executable), " rows"));
    }
  }
}

int64_t chunk_rows(const Executable& executable) {
  return executable.inputs[0].shape[0];
}

int64_t check_batch(const Executable& executable, TensorRefs inputs) {
  if (inputs.size() != executable.inputs.size() || !inputs[0].defined() || inputs[0].dim() == 0) {
    check_inputs(executable, inputs);
  }
  const int64_t rows = inputs[0].size(0);
  const size_t users = executable.user_inputs();
  for (size_t i = users; i < inputs.size(); ++i) {
    check_input(executable, executable.inputs[i], inputs[i],
                "a weight of a traced module keeps its shape and dtype");
  }
  for (size_t i = 0; i < users; ++i) {
    TensorSpec spec = executable.inputs[i];
    spec.shape[0] = rows;
    check_input(executable, spec, inputs[i],
                message("with dynamic batching an input may differ from what was traced in "
                        "dimension 0, by the same as the others (",
                        rows, " rows in '", executable.inputs[0].name, "')"));
  }
  return rows;
}

Tensors chunk_of(const Executable& executable, TensorRefs inputs, int64_t begin) {
  const int64_t size = chunk_rows(executable);
  const size_t users = executable.user_inputs();
  Tensors chunk;
  for (const at::Tensor& input : inputs.slice(0, users)) {
    const int64_t end = std::min(begin + size, input.size(0));
    at::Tensor rows = input.slice(0, begin, end);
    if (end - begin < size) {
      std::vector<int64_t> missing = rows.sizes().vec();
      missing[0] = size - (end - begin);
      rows = at::cat({rows, input.slice(0, end - 1, end).expand(missing)});
    }
    chunk.push_back(rows.contiguous());
  }
  // Weights are no batch.
  for (const at::Tensor& held : inputs.slice(users)) chunk.push_back(held.contiguous());
  return chunk;
}

Tensors join_chunks(const Executable& executable, const std::vector<Tensors>& chunks,
                    int64_t rows) {
  const int64_t size = chunk_rows(executable);
  Tensors outputs;
  for (size_t i = 0; i < executable.outputs.size(); ++i) {
    const TensorSpec& spec = executable.outputs[i];
    if (chunks.empty()) {
      std::vector<int64_t> shape = spec.shape;
      shape[0] = 0;
      outputs.push_back(at::empty(shape, spec.dtype));
      continue;
    }
    std::vector<at::Tensor> parts;
    for (size_t c = 0; c < chunks.size(); ++c) {
      const int64_t left = rows - static_cast<int64_t>(c) * size;
      parts.push_back(left < size ? chunks[c][i].slice(0, 0, left) : chunks[c][i]);
    }
    outputs.push_back(at::cat(parts));
  }
  return outputs;
}

}  // namespace neuron::subgraph
