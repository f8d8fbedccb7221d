#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "runtime/replica_health.h"
#include "runtime/runtime.h"
#include "runtime/typical_duration.h"

namespace neuron::runtime {

/// The replicas of one subgraph: one per core, all loaded, on consecutive cores. Immutable but for
/// its statistics and its judgement of replicas that fail; thread-safe. Requests hold it by shared
/// pointer, so that a set that was replaced unloads when the last request on it ends.
class ReplicaSet : public std::enable_shared_from_this<ReplicaSet> {
 public:
  /// Loads `executable` on every core that `placement` chooses.
  /// @throws std::invalid_argument if the placement does not fit the visible cores,
  /// std::runtime_error if a load fails; nothing stays loaded then.
  static std::shared_ptr<ReplicaSet> load(Runtime& runtime,
                                          const std::shared_ptr<const Executable>& executable,
                                          const Placement& placement);

  /// Computes on the next free replica. Inputs are as `Replica::execute` wants them. What a replica
  /// under suspicion fails at, another does, unless the executable changes its inputs; see
  /// ReplicaHealth.
  /// @throws std::runtime_error on a thread that computes for a replica already; what the replica
  /// throws.
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
  /// Those of `cores` that get no inferences now.
  std::vector<int64_t> quarantined() const;

 private:
  class ExecuteJob;
  /// What a replica threw, not the scheduler. Goes no further than this class.
  struct ReplicaError {
    int32_t replica;
    std::exception_ptr error;
  };
  struct Slot {
    explicit Slot(std::unique_ptr<Replica> loaded) : replica(std::move(loaded)) {}
    std::unique_ptr<Replica> replica;
    std::atomic<int64_t> executions{0};
  };

  ReplicaSet(Runtime& runtime, CoreClaim claim, const Executable& executable,
             std::vector<std::unique_ptr<Slot>> slots);
  Tensors execute_on(int32_t replica, TensorRefs inputs);
  bool brief() const;
  std::optional<Scheduler::Lease> try_lease();
  Tensors execute_once(TensorRefs inputs);
  Tensors execute_under(Scheduler::Lease& lease, TensorRefs inputs);
  template <typename Compute>
  Tensors settled(TensorRefs inputs, const Compute& compute);
  Tensors execute_elsewhere(const ReplicaError& failed, TensorRefs inputs);

  Runtime& runtime_;
  const CoreClaim claim_;
  const std::vector<std::unique_ptr<Slot>> slots_;
  const bool may_borrow_thread_;
  const bool may_compute_here_;  ///< inferences of any length, since none is given up on
  const bool may_repeat_;        ///< an inference that failed leaves its inputs as they were
  TypicalDuration typical_;
  Scheduler::Group group_;
  ReplicaHealth health_;
};

}  // namespace neuron::runtime
