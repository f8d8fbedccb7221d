#include "runtime/replica_set.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <stdexcept>
#include <utility>

#include "common/message.h"

namespace neuron::runtime {
namespace {

// Below this, binding the thread to the core's CPUs would cost as much as it gains.
constexpr std::chrono::nanoseconds kBrief{200'000};

thread_local int32_t core_of_last_inference = -1;

/// While it lives, the calling thread computes for a core. An inference inside another would wait
/// for a core while it holds one: with as many of them as there are cores, for ever.
class Computing {
 public:
  Computing() { now_ = true; }
  ~Computing() { now_ = false; }
  Computing(const Computing&) = delete;
  Computing& operator=(const Computing&) = delete;

  static void check_not_nested() {
    if (!now_) return;
    throw std::runtime_error(
        "a subgraph is called inside another one, which computes now: trace the model as a whole, "
        "or call one traced module after the other from a torch.jit.script module");
  }

 private:
  static thread_local bool now_;
};

thread_local bool Computing::now_ = false;

std::string text_of(const std::exception_ptr& thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "unknown error";
  }
}

/// The exception being handled, with the chunk named.
std::exception_ptr chunk_error(size_t chunk, size_t count) {
  return std::make_exception_ptr(std::runtime_error(
      message("chunk ", chunk + 1, " of ", count, ": ", text_of(std::current_exception()))));
}

std::vector<std::string> names_of_replicas(const std::string& subgraph, const CoreClaim& claim) {
  std::vector<std::string> names;
  for (int32_t i = 0; i < claim.count(); ++i) {
    names.push_back(
        message("the replica of subgraph '", subgraph, "' on core ", claim.first() + i));
  }
  return names;
}

}  // namespace

/// Shares ownership of all it touches: after a timeout it outlives the call that made it. Otherwise
/// it is the core's thread that may let go of it last, when the caller has its results and may have
/// dropped the module: until then nothing of the module, and no input, is left in it.
class ReplicaSet::ExecuteJob : public Job {
 public:
  ExecuteJob(std::shared_ptr<ReplicaSet> set, TensorRefs inputs)
      : set_(std::move(set)), inputs_(inputs.begin(), inputs.end()) {}

  void run(int32_t replica) noexcept override {
    const auto set = std::move(set_);
    core_ = set->claim_.first() + replica;
    try {
      const auto begin = CondVar::Clock::now();
      outputs_ = set->execute_on(replica, inputs_);
      set->typical_.note(CondVar::Clock::now() - begin);
    } catch (...) {
      error_ = std::current_exception();
    }
  }

  /// After Scheduler::await returned, and before `take_outputs`.
  Tensors take_inputs() { return std::move(inputs_); }

  /// @throws ReplicaError
  Tensors take_outputs() {
    core_of_last_inference = core_;
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
    return std::move(outputs_);
  }

 private:
  std::shared_ptr<ReplicaSet> set_;
  Tensors inputs_;
  Tensors outputs_;
  std::exception_ptr error_;
  int32_t core_ = -1;
};

int32_t ReplicaSet::take_last_core() {
  return std::exchange(core_of_last_inference, -1);
}

ReplicaSet::ReplicaSet(Runtime& runtime, CoreClaim claim, const Executable& executable,
                       std::vector<std::unique_ptr<Slot>> slots)
    : runtime_(runtime),
      claim_(std::move(claim)),
      slots_(std::move(slots)),
      may_borrow_thread_(
          std::ranges::all_of(cores(),
                              [&](int64_t core) {
                                return runtime.backend().may_borrow_thread(
                                    runtime.global_index(static_cast<int32_t>(core)));
                              })),
      may_compute_here_(may_borrow_thread_ &&
                        runtime.exec_timeout() == Scheduler::Duration::zero()),
      may_repeat_(executable.mutated_inputs.empty()),
      group_(runtime.scheduler(), claim_.first(), claim_.count()),
      health_(runtime.scheduler(), group_, names_of_replicas(executable.name, claim_)) {}

std::shared_ptr<ReplicaSet> ReplicaSet::load(Runtime& runtime,
                                             const std::shared_ptr<const Executable>& executable,
                                             const Placement& placement) {
  CoreClaim claim = runtime.claim(placement);
  std::vector<std::unique_ptr<Slot>> slots;
  for (int32_t i = 0; i < claim.count(); ++i) {
    slots.push_back(std::make_unique<Slot>(
        runtime.backend().load(executable, runtime.global_index(claim.first() + i))));
  }
  return std::shared_ptr<ReplicaSet>(
      new ReplicaSet(runtime, std::move(claim), *executable, std::move(slots)));
}

bool ReplicaSet::brief() const {
  return may_borrow_thread_ && typical_.below(kBrief);
}

/// Takes a free core for the calling thread to compute on, if it may.
std::optional<Scheduler::Lease> ReplicaSet::try_lease() {
  const bool bound = !brief();
  if (!may_compute_here_ && bound) return std::nullopt;
  return runtime_.scheduler().try_lease(group_, bound);
}

Tensors ReplicaSet::execute_under(Scheduler::Lease& lease, TensorRefs inputs) {
  const int32_t core = claim_.first() + lease.replica();
  core_of_last_inference = core;
  Tensors outputs;
  if (brief()) {
    outputs = execute_on(lease.replica(), inputs);
  } else {
    runtime_.backend().run_borrowed(runtime_.global_index(core),
                                    [&] { outputs = execute_on(lease.replica(), inputs); });
  }
  typical_.note(lease.end());
  return outputs;
}

Tensors ReplicaSet::execute(TensorRefs inputs) {
  Computing::check_not_nested();
  health_.before_inference();
  return settled(inputs, [&] { return execute_once(inputs); });
}

/// What `compute` returns, or what becomes of the inference if a replica failed at it.
template <typename Compute>
Tensors ReplicaSet::settled(TensorRefs inputs, const Compute& compute) {
  try {
    return compute();
  } catch (const ReplicaError& failed) {
    return execute_elsewhere(failed, inputs);
  }
}

/// @throws the replica's error, unless there is reason to let another replica try, which succeeds.
Tensors ReplicaSet::execute_elsewhere(const ReplicaError& failed, TensorRefs inputs) {
  if (!may_repeat_ || !health_.suspect_after_failure(failed.replica)) {
    std::rethrow_exception(failed.error);
  }
  Tensors outputs;
  try {
    outputs = execute_once(inputs);
  } catch (...) {
    health_.acquit(failed.replica);
    std::rethrow_exception(failed.error);
  }
  health_.convict(failed.replica, text_of(failed.error), CondVar::Clock::now());
  return outputs;
}

/// @throws ReplicaError if the replica fails; what the scheduler throws.
Tensors ReplicaSet::execute_once(TensorRefs inputs) {
  if (auto lease = try_lease()) return execute_under(*lease, inputs);
  const auto job = std::make_shared<ExecuteJob>(shared_from_this(), inputs);
  runtime_.scheduler().run(group_, job, runtime_.exec_timeout());
  job->take_inputs();  // the caller still has them
  return job->take_outputs();
}

std::vector<Tensors> ReplicaSet::execute_all(size_t count,
                                             const std::function<Tensors(size_t)>& inputs_of) {
  Computing::check_not_nested();
  std::vector<Tensors> outputs(count);
  std::exception_ptr failure;
  const auto attempt = [&](size_t chunk, const auto& step) {
    try {
      step();
    } catch (...) {
      if (failure == nullptr) failure = chunk_error(chunk, count);
    }
  };
  health_.before_inference();
  std::deque<std::pair<size_t, std::shared_ptr<ExecuteJob>>> under_way;
  const size_t others = slots_.size() - 1;
  size_t next = 0;
  /// Other cores get no more than keeps them busy: other callers wait for few chunks.
  const auto feed_others = [&](size_t cores) {
    while (next < count && failure == nullptr && under_way.size() < 2 * cores) {
      attempt(next, [&] {
        const auto job = std::make_shared<ExecuteJob>(shared_from_this(), inputs_of(next));
        runtime_.scheduler().start(group_, job);
        under_way.emplace_back(next, job);
      });
      ++next;
    }
  };
  while ((next < count && failure == nullptr) || !under_way.empty()) {
    if (next < count && failure == nullptr) {
      if (others == 0 || typical_.below(kHandOver, static_cast<int64_t>(count))) {
        attempt(next, [&] { outputs[next] = execute(inputs_of(next)); });
        ++next;
        continue;
      }
      if (auto lease = try_lease()) {
        const size_t here = next++;
        feed_others(others);
        attempt(here, [&] {
          const Tensors inputs = inputs_of(here);
          outputs[here] = settled(inputs, [&] { return execute_under(*lease, inputs); });
        });
        continue;
      }
      feed_others(slots_.size());
    }
    if (under_way.empty()) continue;
    const auto [chunk, job] = std::move(under_way.front());
    under_way.pop_front();
    attempt(chunk, [&] {
      runtime_.scheduler().await(*job, runtime_.exec_timeout());
      const Tensors inputs = job->take_inputs();
      outputs[chunk] = settled(inputs, [&] { return job->take_outputs(); });
    });
  }
  if (failure != nullptr) std::rethrow_exception(failure);
  return outputs;
}

Tensors ReplicaSet::execute_on(int32_t replica, TensorRefs inputs) {
  Slot& slot = *slots_[replica];
  Tensors outputs;
  try {
    const Computing computing;
    outputs = slot.replica->execute(inputs);
  } catch (...) {
    throw ReplicaError{replica, std::current_exception()};
  }
  slot.executions.fetch_add(1, std::memory_order_relaxed);
  health_.note_success(replica);
  return outputs;
}

std::vector<int64_t> ReplicaSet::cores() const {
  std::vector<int64_t> cores;
  for (int32_t i = 0; i < claim_.count(); ++i) cores.push_back(claim_.first() + i);
  return cores;
}

std::vector<int64_t> ReplicaSet::executions() const {
  std::vector<int64_t> counts;
  for (const auto& slot : slots_) {
    counts.push_back(slot->executions.load(std::memory_order_relaxed));
  }
  return counts;
}

std::vector<int64_t> ReplicaSet::quarantined() const {
  std::vector<int64_t> cores;
  for (int32_t i = 0; i < claim_.count(); ++i) {
    if (runtime_.scheduler().quarantined(group_, i)) cores.push_back(claim_.first() + i);
  }
  return cores;
}

}  // namespace neuron::runtime
