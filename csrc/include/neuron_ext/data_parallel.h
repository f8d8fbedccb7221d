#pragma once

#include <neuron_ext/export.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <optional>
#include <vector>

/// Data parallelism over NeuronCores: the C++ counterpart of `neuron_ext.DataParallel`.
namespace neuron {

/// Loads `model` onto each of `device_ids` (all visible cores if not given) and returns a module
/// with the same `forward`, which cuts its tensors along `dim`, computes the chunks on all the
/// cores at once, and joins what they give, rows in order. Arguments that are no tensors, and
/// tensors of rank 0, go to every chunk; outputs of rank 0 come as one vector.
///
/// `model` itself is moved; for cores that are not consecutive, copies of it are made, which share
/// its code and tensors. The module returned may be saved with `torch::jit::Module::save`, and used
/// wherever the library is loaded.
///
/// With `set_dynamic_batching`, batches of any size are taken where every input and output of
/// `model` has the batch in `dim`. Otherwise the size of a chunk, the batch divided by the number
/// of cores, must be what `model` was traced with.
///
/// Thread-safe, and so is the module's `forward`.
/// @throws std::invalid_argument for ids that are empty, repeated or not there: which;
/// std::runtime_error if a load fails: `model` then runs where it ran. An error of a chunk is
/// thrown when no other chunk runs any more, and names the chunk and its core.
NEURON_EXT_API torch::jit::Module data_parallel(
    torch::jit::Module& model, const std::optional<std::vector<int64_t>>& device_ids = std::nullopt,
    int64_t dim = 0, bool set_dynamic_batching = true);

/// Switches dynamic batching off in a module that `data_parallel` made.
/// @throws std::invalid_argument if it was not made so.
NEURON_EXT_API void disable_dynamic_batching(torch::jit::Module& parallel);

}  // namespace neuron
