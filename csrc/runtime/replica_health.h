#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "common/mutex.h"
#include "runtime/scheduler.h"

namespace neuron::runtime {

/// Which replicas of a set fail again and again, and when these may try again. Thread-safe.
///
/// A replica that fails `kSuspicious` times in a row is suspected: it is taken out, and the
/// inference that failed goes to another. If it fails there as well the fault is the request's and
/// the replica is put back; if not, the replica stays out. After a pause it gets one inference
/// again, under the same suspicion; each time that fails doubles the pause.
class ReplicaHealth {
 public:
  using Clock = CondVar::Clock;

  static constexpr int32_t kSuspicious = 3;
  static constexpr std::chrono::seconds kFirstPause{1};
  static constexpr std::chrono::seconds kLongestPause{60};

  /// `names` are for the log: one for each replica of `group`, which must outlive this.
  ReplicaHealth(Scheduler& scheduler, Scheduler::Group& group, std::vector<std::string> names);

  /// To be called before each inference: puts back what may try again.
  void before_inference() {
    if (next_trial_.load(std::memory_order_relaxed) != kNever) put_back_due(Clock::now());
  }
  void put_back_due(Clock::time_point now) EXCLUDES(mutex_);

  void note_success(int32_t replica) {
    if (slots_[replica].failures.load(std::memory_order_relaxed) != 0) forget_failures(replica);
  }

  /// Counts a failure. If it is one too many, and there is another replica, takes this one out and
  /// returns true; `acquit` or `convict` then has to be called, once.
  bool suspect_after_failure(int32_t replica) EXCLUDES(mutex_);

  /// The inference failed elsewhere as well.
  void acquit(int32_t replica) EXCLUDES(mutex_);

  /// The inference did not fail elsewhere.
  void convict(int32_t replica, const std::string& error, Clock::time_point now) EXCLUDES(mutex_);

 private:
  static constexpr int64_t kNever = INT64_MAX;

  struct Slot {
    std::atomic<int32_t> failures{0};  ///< in a row
    // The others under ReplicaHealth::mutex_.
    int32_t suspicions = 0;  ///< neither acquitted nor convicted
    bool convicted = false;
    Clock::time_point trial{};
    Clock::duration pause{};  ///< zero if never convicted since it last worked
  };

  void forget_failures(int32_t replica) EXCLUDES(mutex_);
  void find_next_trial() REQUIRES(mutex_);

  Scheduler& scheduler_;
  Scheduler::Group& group_;
  const std::vector<std::string> names_;
  Mutex mutex_;
  std::vector<Slot> slots_;
  std::atomic<int64_t> next_trial_{kNever};  ///< ticks of Clock
};

}  // namespace neuron::runtime
