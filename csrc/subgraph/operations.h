#pragma once

#include <neuron_ext/status.h>

#include <chrono>
#include <optional>
#include <vector>

#include "subgraph/neuron_subgraph.h"

namespace neuron::subgraph {

/// What the public functions do, over the subgraphs of a module. Both the TorchScript ops and the
/// C++ functions call these. Contracts stand with those: include/neuron_ext/*.h.
using Subgraphs = std::vector<SubgraphHandle>;

runtime::Tensors forward(runtime::TensorRefs inputs, const SubgraphHandle& subgraph);

/// The same for a subgraph whose module holds weights or state: these are `held`, and the state is
/// updated by a call that succeeds.
runtime::Tensors forward_held(runtime::TensorRefs inputs, runtime::TensorRefs held,
                              const SubgraphHandle& subgraph);

/// All move, or none; those with the async flag then follow in the background.
void set_neuron_cores(const Subgraphs& subgraphs, int64_t start_nc, int64_t nc_count);
void set_multicore(const Subgraphs& subgraphs);
void set_lazy_load(const Subgraphs& subgraphs, bool enable);
void set_async_load(const Subgraphs& subgraphs, bool enable);
/// @throws std::invalid_argument, and changes none, if one of them cannot be batched.
void set_dynamic_batch(const Subgraphs& subgraphs, bool enable);
std::vector<SubgraphStatus> status(const Subgraphs& subgraphs);
bool wait(const Subgraphs& subgraphs, std::optional<double> timeout_seconds);
void unload(const Subgraphs& subgraphs);

/// Opens a context on this thread after checking it; returns its token.
int64_t enter_neuron_cores_context(int64_t start_nc, int64_t nc_count);
int64_t enter_multicore_context();

/// To be called when Python begins to shut down: its daemon threads must not come back from an op
/// into an interpreter that is gone, which would abort the process.
void prepare_exit();

int64_t visible_core_count();

/// The threads that a core of the host runtime computes with under the settings of now. Takes no
/// core.
int64_t host_threads_per_core();
std::vector<CoreStats> core_stats();

}  // namespace neuron::subgraph
