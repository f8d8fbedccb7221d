#pragma once

#include <ATen/core/Tensor.h>
#include <neuron_ext/export.h>
#include <torch/csrc/jit/api/module.h>

#include <string>
#include <unordered_map>

/// Weights and state that stand in a traced module as tensors of their own: what
/// `neuron_ext.trace(..., inline_weights_to_neff=False)` and `input_output_aliases` make.
/// All functions are thread-safe, and may be called while other threads run the module.
/// Errors: std::invalid_argument for what the caller said; nothing has changed then.
namespace neuron {

/// Copies `weights` into the separated weights of `module`, in place. Names are those of the
/// module's state dict. Each separated weight must be there, once where several names are tied, in
/// its own shape and dtype and on the CPU; names that it does not know are refused. State tensors
/// are no weights: `weights` may name them, and they stay as they are.
/// Each request of a traced module sees the old weights or the new ones; the call waits for those
/// under way. Returns false, and does nothing, if the module has no separated weights.
NEURON_EXT_API bool replace_weights(torch::jit::Module& module,
                                    const std::unordered_map<std::string, at::Tensor>& weights);

/// Puts the initial values back into all state of `module`, between two requests. A module without
/// state is left alone.
NEURON_EXT_API void reset_state(torch::jit::Module& module);

}  // namespace neuron
