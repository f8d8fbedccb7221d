#include "subgraph/operations.h"

#include <algorithm>
#include <memory>
#include <set>
#include <stdexcept>
#include <thread>

#include "common/message.h"
#include "placement/context.h"
#include "runtime/host/host_backend.h"
#include "subgraph/batch.h"
#include "subgraph/held_tensors.h"

namespace neuron::subgraph {
namespace {

using runtime::Runtime;

Placement checked(int64_t start_nc, int64_t nc_count) {
  return make_placement(start_nc, nc_count, Runtime::get().core_count());
}

Placement all_cores() {
  return {0, Runtime::get().core_count()};
}

void move(const Subgraphs& subgraphs, const Placement& placement) {
  const runtime::ExitGate gate;
  // Two callers that move the same subgraphs take them in the same order, so neither waits for the
  // other for ever; and each once, so none waits for itself.
  std::set<std::shared_ptr<Subgraph>> ordered;
  for (const auto& handle : subgraphs) ordered.insert(handle->get());
  std::vector<std::shared_ptr<Subgraph>> background;
  std::vector<std::unique_ptr<Subgraph::Move>> moves;
  for (const auto& subgraph : ordered) {
    if (subgraph->wishes().async_load) {
      background.push_back(subgraph);
    } else {
      moves.push_back(std::make_unique<Subgraph::Move>(subgraph, placement));
    }
  }
  for (const auto& done : moves) done->commit();
  for (const auto& subgraph : background) subgraph->move_in_background(placement);
}

}  // namespace

runtime::Tensors forward(runtime::TensorRefs inputs, const SubgraphHandle& subgraph) {
  Runtime::check_not_forked();
  const runtime::ExitGate gate;
  return subgraph->get()->forward(inputs);
}

runtime::Tensors forward_held(runtime::TensorRefs inputs, runtime::TensorRefs held,
                              const SubgraphHandle& subgraph) {
  Runtime::check_not_forked();
  const runtime::ExitGate exit;
  const runtime::Executable& executable = subgraph->get()->executable();
  check_held(executable, held);
  if (held.empty()) return subgraph->get()->forward(inputs);
  runtime::Tensors all;
  all.reserve(inputs.size() + held.size());
  all.append(inputs.begin(), inputs.end());
  all.append(held.begin(), held.end());
  // Inside the exit gate: a thread that stays there for ever holds no other gate.
  const GateScope gate({{gate_of(held[0]), request_mode(executable)}});
  runtime::Tensors outputs = subgraph->get()->forward(all);
  finish_held(executable, held, outputs);
  return outputs;
}

void set_neuron_cores(const Subgraphs& subgraphs, int64_t start_nc, int64_t nc_count) {
  if (!subgraphs.empty()) move(subgraphs, checked(start_nc, nc_count));
}

void set_multicore(const Subgraphs& subgraphs) {
  if (!subgraphs.empty()) move(subgraphs, all_cores());
}

void set_lazy_load(const Subgraphs& subgraphs, bool enable) {
  for (const auto& subgraph : subgraphs) subgraph->get()->set_lazy_load(enable);
}

void set_async_load(const Subgraphs& subgraphs, bool enable) {
  for (const auto& subgraph : subgraphs) subgraph->get()->set_async_load(enable);
}

void set_dynamic_batch(const Subgraphs& subgraphs, bool enable) {
  // All or none.
  for (const auto& subgraph : subgraphs) {
    if (enable) check_batchable(subgraph->get()->executable());
  }
  for (const auto& subgraph : subgraphs) subgraph->get()->set_dynamic_batch(enable);
}

std::vector<SubgraphStatus> status(const Subgraphs& subgraphs) {
  Runtime::check_not_forked();
  std::vector<SubgraphStatus> all;
  for (const auto& subgraph : subgraphs) all.push_back(subgraph->get()->status());
  return all;
}

bool wait(const Subgraphs& subgraphs, std::optional<double> timeout_seconds) {
  Runtime::check_not_forked();
  const runtime::ExitGate gate;
  Subgraph::Deadline deadline;
  if (timeout_seconds) {
    if (!(*timeout_seconds >= 0)) {
      throw std::invalid_argument(
          message("timeout=", *timeout_seconds, " is not a time: use 0 or more seconds"));
    }
    constexpr double kYear = 3.2e7;  // keeps the sum within the clock's range
    deadline = CondVar::Clock::now() +
               std::chrono::duration_cast<CondVar::Clock::duration>(
                   std::chrono::duration<double>(std::min(*timeout_seconds, kYear)));
  }
  for (const auto& subgraph : subgraphs) subgraph->get()->start_loading();
  for (const auto& subgraph : subgraphs) {
    if (!subgraph->get()->wait(deadline)) return false;
  }
  return true;
}

void unload(const Subgraphs& subgraphs) {
  Runtime::check_not_forked();
  const runtime::ExitGate gate;
  for (const auto& subgraph : subgraphs) subgraph->get()->unload();
}

int64_t enter_neuron_cores_context(int64_t start_nc, int64_t nc_count) {
  return enter_placement_context(checked(start_nc, nc_count));
}

int64_t enter_multicore_context() {
  return enter_placement_context(all_cores());
}

int64_t host_threads_per_core() {
  return runtime::host::threads_per_core(runtime::Settings::from_environment().host_cores);
}

int64_t visible_core_count() {
  return Runtime::get().core_count();
}

void prepare_exit() {
  if (!Runtime::exists() || Runtime::lost_by_fork()) return;
  // An inference that hangs is dealt with at the exit of the process itself, which has the exit
  // code.
  constexpr auto kPatience = std::chrono::seconds(5);
  Runtime::close_until(CondVar::Clock::now() + kPatience);
  // Threads that left an op just before are waiting to enter Python again; they need a moment for
  // it.
  constexpr auto kMoment = std::chrono::milliseconds(20);
  std::this_thread::sleep_for(kMoment);
}

std::vector<CoreStats> core_stats() {
  return Runtime::get().stats();
}

}  // namespace neuron::subgraph
