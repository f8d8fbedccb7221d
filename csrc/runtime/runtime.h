#pragma once

#include <neuron_ext/status.h>

#include <memory>
#include <vector>

#include "common/mutex.h"
#include "placement/placement.h"
#include "runtime/backend.h"
#include "runtime/scheduler.h"
#include "runtime/settings.h"
#include "runtime/thread_pool.h"
#include "runtime/visible_cores.h"

namespace neuron::runtime {

/// Cores counted as used by a set of replicas, from the moment they are chosen. RAII.
class CoreClaim {
 public:
  CoreClaim(CoreClaim&& other) noexcept;
  CoreClaim& operator=(CoreClaim&&) = delete;
  ~CoreClaim();
  int32_t first() const { return first_; }
  int32_t count() const { return count_; }

 private:
  friend class Runtime;
  CoreClaim(class Runtime& runtime, int32_t first, int32_t count);
  class Runtime* runtime_;
  int32_t first_;
  int32_t count_;
};

/// Where threads from outside enter and leave; see Runtime::close_until.
class ExitGate {
 public:
  ExitGate() { pass(); }
  ~ExitGate() { pass(); }
  ExitGate(const ExitGate&) = delete;
  ExitGate& operator=(const ExitGate&) = delete;

  /// Where threads may hold the lock of Python's interpreter: it keeps them only when that is gone.
  static void pass_load();

  /// While it lives, gates let the calling thread pass: one of the runtime's own, which never
  /// returns to Python, and which `close_until` waits for.
  class Exempt {
   public:
    Exempt();
    ~Exempt();
    Exempt(const Exempt&) = delete;
    Exempt& operator=(const Exempt&) = delete;
  };

 private:
  static void pass();
};

/// Owns the cores of this process: the backend, the scheduler, the loader threads, and which core
/// carries how many replicas. One per process, made at first need and never destroyed, because
/// threads and static objects of others may use it until the very end. Thread-safe.
class Runtime {
 public:
  /// The process's runtime; the first call makes it from the environment.
  /// @throws std::runtime_error if that fails (the next call tries again), or in a forked child of
  /// a process that had made one.
  static Runtime& get();

  /// Whether `get` has made a runtime in this process, or in the one it was forked from.
  static bool exists();

  /// Whether this process was forked from one that had made a runtime: threads and cores did not
  /// come along, and locks may be held by threads that are not there.
  static bool lost_by_fork();

  /// @throws std::runtime_error if `lost_by_fork`.
  static void check_not_forked();

  /// Whether `close_until` has begun: nothing new is worth beginning.
  static bool closing();

  /// For tests: a runtime of its own over `backend`, used by `get` until `uninstall_for_testing`.
  static Runtime& install_for_testing(std::unique_ptr<Backend> backend, const Settings& settings);
  static void uninstall_for_testing();

  Runtime(std::unique_ptr<Backend> backend, const Settings& settings);
  ~Runtime() = default;
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  /// For the end of the process. Loads and inferences under way are waited for, at most until
  /// `deadline`; those not begun never begin. Threads other than the calling one that are in, or
  /// come to, an `ExitGate` stay there for ever, and end with the process: returned to Python they
  /// would find an interpreter that is gone. Returns whether all ended in time.
  static bool close_until(CondVar::Clock::time_point deadline);

  int32_t core_count() const { return static_cast<int32_t>(cores_.global_indices.size()); }
  int32_t global_index(int32_t core) const { return cores_.global_indices[core]; }
  Backend& backend() { return *backend_; }
  Scheduler& scheduler() { return scheduler_; }
  /// For loads in the background.
  ThreadPool& loader_threads() { return loader_threads_; }
  /// For the chunks of a DataParallel call: enough to keep all cores at work beside the callers.
  ThreadPool& chunk_threads() { return chunk_threads_; }
  Scheduler::Duration exec_timeout() const { return settings_.exec_timeout; }

  /// Chooses the cores for `placement` and counts them as used.
  /// @throws std::invalid_argument if the placement does not fit.
  CoreClaim claim(const Placement& placement);

  std::vector<CoreStats> stats() const;

 private:
  friend class CoreClaim;
  friend class ExitGate;
  static void stop_at_exit(int status, void* unused);
  static void register_exit_again();

  const Settings settings_;
  const std::unique_ptr<Backend> backend_;
  const VisibleCores cores_;
  mutable Mutex mutex_;
  std::vector<int64_t> loads_ GUARDED_BY(mutex_);
  Scheduler scheduler_;
  ThreadPool loader_threads_;
  ThreadPool chunk_threads_;
};

}  // namespace neuron::runtime
