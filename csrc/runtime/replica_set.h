#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "runtime/runtime.h"
#include "runtime/typical_duration.h"

namespace neuron::runtime {

/// The replicas of one subgraph: one per core, all loaded, on consecutive cores. Immutable but for
/// its statistics; thread-safe. Requests hold it by shared pointer, so that a set that was replaced
/// unloads when the last request on it ends.
class ReplicaSet : public std::enable_shared_from_this<ReplicaSet> {
 public:
  /// Loads `executable` on every core that `placement` chooses.
  /// @throws std::invalid_argument if the placement does not fit the visible cores,
  /// std::runtime_error if a load fails; nothing stays loaded then.
  static std::shared_ptr<ReplicaSet> load(Runtime& runtime,
                                          const std::shared_ptr<const Executable>& executable,
                                          const Placement& placement);

  /// Computes on the next free replica. Inputs are as `Replica::execute` wants them.
  Tensors execute(TensorRefs inputs);

  /// Computes `count` chunks on all replicas at once; `inputs_of` makes the inputs of one when its
  /// turn has come.
  /// @throws the first error, with the chunk named, when none of the chunks runs any more.
  std::vector<Tensors> execute_all(size_t count, const std::function<Tensors(size_t)>& inputs_of);

  /// The core of the calling thread's last inference, also of one that failed, and forgets it; -1
  /// if there was none since.
  static int32_t take_last_core();

  std::vector<int64_t> cores() const;
  std::vector<int64_t> executions() const;

 private:
  class ExecuteJob;
  struct Slot {
    explicit Slot(std::unique_ptr<Replica> loaded) : replica(std::move(loaded)) {}
    std::unique_ptr<Replica> replica;
    std::atomic<int64_t> executions{0};
  };

  ReplicaSet(Runtime& runtime, CoreClaim claim, std::vector<std::unique_ptr<Slot>> slots);
  Tensors execute_on(int32_t replica, TensorRefs inputs);
  bool brief() const;
  std::optional<Scheduler::Lease> try_lease();
  Tensors execute_under(Scheduler::Lease& lease, TensorRefs inputs);

  Runtime& runtime_;
  const CoreClaim claim_;
  const std::vector<std::unique_ptr<Slot>> slots_;
  const bool may_borrow_thread_;
  const bool may_compute_here_;  ///< inferences of any length, since none is given up on
  TypicalDuration typical_;
  Scheduler::Group group_;
};

}  // namespace neuron::runtime
