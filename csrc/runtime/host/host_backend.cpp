#include "runtime/host/host_backend.h"

#include <stdexcept>
#include <utility>

#include "common/message.h"
#include "runtime/host/inductor_program.h"
#include "runtime/host/machine_check.h"
#include "runtime/host/thread_settings.h"
#include "runtime/host/torchscript_program.h"

namespace neuron::runtime::host {
namespace {

std::vector<std::vector<int32_t>> make_shares(std::optional<int32_t> core_count) {
  const CpuBudget budget = cpu_budget();
  return share_cpus(budget.cpus, core_count.value_or(budget.usable));
}

}  // namespace

int32_t threads_per_core(std::optional<int32_t> core_count) {
  return static_cast<int32_t>(make_shares(core_count).front().size());
}

HostBackend::HostBackend(std::optional<int32_t> core_count) : shares_(make_shares(core_count)) {}

template <typename Program>
std::shared_ptr<Program> HostBackend::Shared<Program>::get(
    const std::shared_ptr<const Executable>& executable) {
  {
    MutexLock lock(mutex_);
    std::erase_if(programs_, [](const auto& entry) { return entry.second.expired(); });
    const auto found = programs_.find(executable);
    if (found != programs_.end()) {
      if (auto program = found->second.lock()) return program;
    }
  }
  // Made outside the lock, so that loads of different executables overlap. A subgraph loads its
  // replicas one after another, so none is made twice in practice; if it were, both would work.
  auto program = Program::load(executable);
  MutexLock lock(mutex_);
  programs_.insert_or_assign(executable, program);
  return program;
}

std::unique_ptr<Replica> HostBackend::load(const std::shared_ptr<const Executable>& executable,
                                           int32_t core) {
  switch (choose_format(*executable)) {
    case Format::kInductor:
      return inductor_.get(executable)->make_replica(intra_op_threads(core));
    case Format::kTorchScript:
      return torchscript_.get(executable)->make_replica(intra_op_threads(core));
    case Format::kNeff:
      break;
  }
  throw std::runtime_error(
      message("subgraph '", executable->name,
              "' is a NEFF, which needs real NeuronCores; this process runs on the "
              "host runtime"));
}

void HostBackend::adopt_core_thread(int32_t core) {
  pin_this_thread(shares_[core]);
}

bool HostBackend::may_borrow_thread(int32_t core) const {
  // With more than one CPU, every borrowed thread would bring its own team of OpenMP threads.
  return intra_op_threads(core) == 1;
}

void HostBackend::run_borrowed(int32_t core, c10::function_ref<void()> work) {
  const CpuBinding binding(shares_[core]);
  work();
}

}  // namespace neuron::runtime::host
