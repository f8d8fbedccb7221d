#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "common/mutex.h"
#include "runtime/caller.h"

namespace neuron::runtime {

/// One inference for a core's own thread.
class Job {
 public:
  virtual ~Job() = default;

  /// Computes. `replica` counts from the first core of the group.
  virtual void run(int32_t replica) noexcept = 0;

 private:
  friend class Scheduler;
  enum class State { kWaiting, kRunning, kDone, kRefused };

  Mutex mutex_;
  CondVar changed_;
  State state_ GUARDED_BY(mutex_) = State::kWaiting;
  CondVar::Clock::time_point started_ GUARDED_BY(mutex_);
  int32_t core_ GUARDED_BY(mutex_) = -1;
  // Written once, before the job is shared with a core's thread.
  int64_t ticket_ = 0;
  int32_t first_core_ = 0;
};

/// Decides which core computes which inference; knows nothing of tensors or devices.
///
/// Each core computes one inference at a time, whichever group it comes from. A group's inferences
/// go round robin over its cores, past busy ones; when all are busy they queue, and a core that
/// gets free takes the oldest queued inference that it may compute. A replica that was taken out
/// gets none, nor does a core whose inference ran out of time, until it comes back.
///
/// Thread-safe. Lock order: mutex_ before Job::mutex_. No lock is held while an inference computes.
class Scheduler {
 public:
  using Duration = CondVar::Clock::duration;

  struct CoreCounts {
    int64_t executions = 0;
    Duration busy{};
    bool quarantined = false;  ///< it does not answer, or a replica on it was taken out
  };

  /// @param on_core_thread called once on each core's thread, with the core, before its first job.
  Scheduler(int32_t core_count, std::function<void(int32_t)> on_core_thread);

  /// No job may be running or queued.
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// The cores first_core .. first_core+count-1, as one set of replicas. Starts at first_core.
  class Group {
   public:
    Group(Scheduler& scheduler, int32_t first_core, int32_t count);
    /// No job of the group may be running or queued.
    ~Group();
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;

   private:
    friend class Scheduler;
    Scheduler& scheduler_;
    const int32_t first_core_;
    const int32_t count_;
    // Guarded by Scheduler::mutex_, which the analysis cannot name from here.
    int32_t next_ = 0;
    bool has_threads_ = false;   ///< each of its cores
    std::vector<uint64_t> out_;  ///< as `Scheduler::free_`; empty while no replica is taken out
    std::deque<std::shared_ptr<Job>> queue_;
  };

  /// A core held by the calling thread, given back on destruction.
  class Lease {
   public:
    Lease(Lease&& other) noexcept;
    Lease& operator=(Lease&&) = delete;
    ~Lease();
    int32_t replica() const { return replica_; }

    /// Gives the core back now and returns how long it was held. To be called once.
    Duration end();

   private:
    friend class Scheduler;
    Lease(Scheduler& scheduler, int32_t core, int32_t replica);
    Scheduler* scheduler_;
    int32_t core_;
    int32_t replica_;
    CondVar::Clock::time_point since_;
  };

  /// Takes the next core of the group that is free, for the calling thread to compute on.
  /// @param bound whether the thread will be bound to the core's CPUs. It then stays on the core
  /// that it leased last rather than go to that of another thread that computed at the same time.
  std::optional<Lease> try_lease(Group& group, bool bound = false);

  /// Has the next free core of the group run `job` on the core's own thread, and waits until it is
  /// done. `timeout` counts from the moment the core begins; zero waits as long as it takes.
  /// @throws std::runtime_error if the time passes, or if no core of the group answers any more.
  /// The job may then still be running: whoever made it must keep what it uses alive.
  void run(Group& group, const std::shared_ptr<Job>& job, Duration timeout);

  /// The two halves of `run`. Each job that was started has to be awaited, once.
  void start(Group& group, const std::shared_ptr<Job>& job) EXCLUDES(mutex_);
  void await(Job& job, Duration timeout) EXCLUDES(mutex_);

  /// Gives the replica no more inferences, until `put_back`. False, and nothing is done, if no
  /// other replica of the group could take them.
  bool take_out(Group& group, int32_t replica) EXCLUDES(mutex_);
  void put_back(Group& group, int32_t replica) EXCLUDES(mutex_);

  /// Whether the replica gets no inferences: it was taken out, or its core does not answer.
  bool quarantined(const Group& group, int32_t replica) const EXCLUDES(mutex_);

  CoreCounts counts(int32_t core) const;

  /// How many cores compute now, and how many jobs wait for one.
  int32_t busy() const;
  int32_t queued() const;

  /// For the end of the process: what is queued never begins. Waits until no core computes, at most
  /// until `deadline`; returns whether that came. Callers that still come are served.
  bool close_until(CondVar::Clock::time_point deadline);

 private:
  struct Core {
    bool silent = false;  ///< an inference ran out of time and has not come back
    std::vector<Group*> groups;
    CoreCounts counts;
    std::weak_ptr<const Caller> holder;  ///< who was last bound to it, while that thread lives
    CondVar::Clock::time_point released;
    std::thread thread;
    CondVar wake;
    std::shared_ptr<Job> next;
  };

  void core_thread(int32_t core_index) EXCLUDES(mutex_);
  void start_threads(Group& group) REQUIRES(mutex_);
  static bool is_out(const Group& group, int32_t core);
  static void set_out(Group& group, int32_t core, bool out);
  bool may_compute(const Group& group, int32_t core) const REQUIRES(mutex_);
  bool any_may_compute(const Group& group) const REQUIRES(mutex_);
  bool all_silent(const Group& group) const REQUIRES(mutex_);
  void serve_queue(int32_t core_index) REQUIRES(mutex_);
  int32_t find_free_core(const Group& group, int32_t begin, int32_t end) const REQUIRES(mutex_);
  int32_t take_free_core(Group& group) REQUIRES(mutex_);
  void stay_on_own_core(Group& group, const std::shared_ptr<Caller>& caller) REQUIRES(mutex_);
  std::shared_ptr<Job> pop_oldest(int32_t core_index) REQUIRES(mutex_);
  Duration finished(int32_t core_index, CondVar::Clock::time_point since) REQUIRES(mutex_);
  Duration release(const Lease& lease) EXCLUDES(mutex_);
  bool silence_if_running(Job& job) EXCLUDES(mutex_);

  const std::function<void(int32_t)> on_core_thread_;
  mutable Mutex mutex_;
  CondVar idle_;
  std::vector<std::unique_ptr<Core>> cores_ GUARDED_BY(mutex_);
  /// A bit per core, so that the search for a free one costs the same however many there are.
  std::vector<uint64_t> free_ GUARDED_BY(mutex_);
  int32_t busy_cores_ GUARDED_BY(mutex_) = 0;
  int32_t silent_cores_ GUARDED_BY(mutex_) = 0;
  int32_t queued_jobs_ GUARDED_BY(mutex_) = 0;
  int64_t next_ticket_ GUARDED_BY(mutex_) = 0;
  bool stopping_ GUARDED_BY(mutex_) = false;
  bool closed_ GUARDED_BY(mutex_) = false;
};

}  // namespace neuron::runtime
