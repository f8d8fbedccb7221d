#include "runtime/replica_health.h"

#include <algorithm>
#include <utility>

#include "common/log.h"
#include "common/message.h"

namespace neuron::runtime {

ReplicaHealth::ReplicaHealth(Scheduler& scheduler, Scheduler::Group& group,
                             std::vector<std::string> names)
    : scheduler_(scheduler), group_(group), names_(std::move(names)), slots_(names_.size()) {}

void ReplicaHealth::put_back_due(Clock::time_point now) {
  if (now.time_since_epoch().count() < next_trial_.load(std::memory_order_relaxed)) return;
  MutexLock lock(mutex_);
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (!slot.convicted || slot.trial > now) continue;
    slot.convicted = false;
    slot.failures = kSuspicious - 1;
    scheduler_.put_back(group_, static_cast<int32_t>(i));
  }
  find_next_trial();
}

void ReplicaHealth::forget_failures(int32_t replica) {
  bool was_out = false;
  {
    MutexLock lock(mutex_);
    Slot& slot = slots_[replica];
    // An inference that began before it was taken out tells nothing new.
    if (slot.convicted || slot.suspicions > 0) return;
    slot.failures = 0;
    was_out = std::exchange(slot.pause, {}) != Clock::duration::zero();
  }
  if (was_out) log(LogLevel::kWarning, message(names_[replica], " works again"));
}

bool ReplicaHealth::suspect_after_failure(int32_t replica) {
  MutexLock lock(mutex_);
  Slot& slot = slots_[replica];
  if (++slot.failures < kSuspicious) return false;
  if (!scheduler_.take_out(group_, replica)) return false;
  ++slot.suspicions;
  return true;
}

void ReplicaHealth::acquit(int32_t replica) {
  MutexLock lock(mutex_);
  Slot& slot = slots_[replica];
  --slot.suspicions;
  if (slot.convicted || slot.suspicions > 0) return;
  // One that was out before stays under suspicion until it has worked.
  slot.failures = slot.pause == Clock::duration::zero() ? 0 : kSuspicious - 1;
  scheduler_.put_back(group_, replica);
}

void ReplicaHealth::convict(int32_t replica, const std::string& error, Clock::time_point now) {
  Clock::duration pause{};
  {
    MutexLock lock(mutex_);
    Slot& slot = slots_[replica];
    --slot.suspicions;
    if (std::exchange(slot.convicted, true)) return;
    pause = slot.pause == Clock::duration::zero()
                ? kFirstPause
                : std::min<Clock::duration>(2 * slot.pause, kLongestPause);
    slot.pause = pause;
    slot.trial = now + pause;
    find_next_trial();
  }
  const double seconds = std::chrono::duration<double>(pause).count();
  log(LogLevel::kWarning,
      message(names_[replica], " fails again and again and is taken out for ", seconds,
              " s; what it failed at last, another replica did: ", error));
}

void ReplicaHealth::find_next_trial() {
  int64_t next = kNever;
  for (const Slot& slot : slots_) {
    if (slot.convicted) next = std::min(next, int64_t{slot.trial.time_since_epoch().count()});
  }
  next_trial_.store(next, std::memory_order_relaxed);
}

}  // namespace neuron::runtime
