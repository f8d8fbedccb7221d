#pragma once

#include <neuron_ext/export.h>
#include <neuron_ext/status.h>
#include <torch/csrc/jit/api/module.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

/// Loading, state and statistics of traced modules. All functions are thread-safe.
/// Errors: std::invalid_argument for what the caller said, std::runtime_error for what the machine
/// could not do. A module without subgraphs is left alone.
namespace neuron {

/// With lazy load, `torch::jit::load` does not load onto a core; the first use does. Saved with the
/// module.
NEURON_EXT_API void lazy_load(torch::jit::Module& module, bool enable = true);

/// With async load, whatever triggers a load returns at once, and forward waits for it. Saved with
/// the module.
NEURON_EXT_API void async_load(torch::jit::Module& module, bool enable = true);

/// With dynamic batching, inputs may have any size in dimension 0, the same in all of them: the
/// batch is cut into chunks of the size traced, the last one is padded, and the replicas share
/// them. Saved with the module.
/// @throws std::invalid_argument if not every input and output has the batch as dimension 0.
NEURON_EXT_API void dynamic_batch(torch::jit::Module& module, bool enable = true);

/// One entry per subgraph, in the order of the module's attributes.
NEURON_EXT_API std::vector<SubgraphStatus> status(const torch::jit::Module& module);

/// Starts loads that have not begun, waits for those under way, and throws a failed load's error.
/// Returns false if `timeout` passed first; without one it waits as long as it takes.
NEURON_EXT_API bool wait(const torch::jit::Module& module,
                         std::optional<std::chrono::duration<double>> timeout = std::nullopt);

/// Frees the cores; requests in flight finish. The next use loads again.
NEURON_EXT_API void unload(torch::jit::Module& module);

/// How many cores this process may use. Initialises the runtime.
NEURON_EXT_API int32_t visible_core_count();

/// One entry per visible core. Initialises the runtime.
NEURON_EXT_API std::vector<CoreStats> core_stats();

}  // namespace neuron
