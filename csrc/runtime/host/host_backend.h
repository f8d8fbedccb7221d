#pragma once

#include <map>
#include <optional>

#include "common/mutex.h"
#include "runtime/backend.h"
#include "runtime/host/cpu_topology.h"

namespace neuron::runtime::host {

class InductorProgram;
class TorchScriptProgram;

/// How many threads a core computes with, where there are `core_count` of them: the CPUs in its
/// share.
int32_t threads_per_core(std::optional<int32_t> core_count);

/// This machine's CPUs as NeuronCores: each core is an equal share of the CPUs that the process may
/// use. Runs `inductor` and `torchscript` executables.
class HostBackend final : public Backend {
 public:
  /// @param core_count one for each usable CPU if not given.
  explicit HostBackend(std::optional<int32_t> core_count);

  std::string name() const override { return "host"; }
  int32_t core_count() const override { return static_cast<int32_t>(shares_.size()); }
  std::vector<int32_t> cpus(int32_t core) const override { return shares_[core]; }
  std::unique_ptr<Replica> load(const std::shared_ptr<const Executable>& executable,
                                int32_t core) override;
  void adopt_core_thread(int32_t core) override;
  bool may_borrow_thread(int32_t core) const override;
  void run_borrowed(int32_t core, c10::function_ref<void()> work) override;

 private:
  /// The programs in use, by the executable they were made from, so that replicas share them.
  template <typename Program>
  class Shared {
   public:
    std::shared_ptr<Program> get(const std::shared_ptr<const Executable>& executable);

   private:
    Mutex mutex_;
    std::map<std::weak_ptr<const Executable>, std::weak_ptr<Program>, std::owner_less<>> programs_
        GUARDED_BY(mutex_);
  };

  int32_t intra_op_threads(int32_t core) const {
    return static_cast<int32_t>(shares_[core].size());
  }

  const std::vector<std::vector<int32_t>> shares_;
  Shared<InductorProgram> inductor_;
  Shared<TorchScriptProgram> torchscript_;
};

}  // namespace neuron::runtime::host
