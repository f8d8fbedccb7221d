#include "runtime/scheduler.h"

#include <pthread.h>

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <utility>

#include "common/message.h"

namespace neuron::runtime {

using Clock = CondVar::Clock;

namespace {

constexpr int32_t kWordBits = 64;

uint64_t bit_of(int32_t core) {
  return uint64_t{1} << core % kWordBits;
}

}  // namespace

Scheduler::Scheduler(int32_t core_count, std::function<void(int32_t)> on_core_thread)
    : on_core_thread_(std::move(on_core_thread)) {
  MutexLock lock(mutex_);
  free_.resize(static_cast<size_t>(core_count + kWordBits - 1) / kWordBits);
  for (int32_t i = 0; i < core_count; ++i) {
    cores_.push_back(std::make_unique<Core>());
    free_[i / kWordBits] |= bit_of(i);
  }
}

Scheduler::~Scheduler() {
  std::vector<std::thread> threads;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    for (auto& core : cores_) {
      core->wake.notify_one();
      if (core->thread.joinable()) threads.push_back(std::move(core->thread));
    }
  }
  for (auto& thread : threads) thread.join();
}

Scheduler::Group::Group(Scheduler& scheduler, int32_t first_core, int32_t count)
    : scheduler_(scheduler), first_core_(first_core), count_(count) {
  MutexLock lock(scheduler.mutex_);
  for (int32_t i = 0; i < count; ++i) scheduler.cores_[first_core + i]->groups.push_back(this);
}

Scheduler::Group::~Group() {
  MutexLock lock(scheduler_.mutex_);
  for (int32_t i = 0; i < count_; ++i) {
    std::erase(scheduler_.cores_[first_core_ + i]->groups, this);
  }
}

Scheduler::Lease::Lease(Scheduler& scheduler, int32_t core, int32_t replica)
    : scheduler_(&scheduler), core_(core), replica_(replica), since_(Clock::now()) {}

Scheduler::Lease::Lease(Lease&& other) noexcept
    : scheduler_(std::exchange(other.scheduler_, nullptr)),
      core_(other.core_),
      replica_(other.replica_),
      since_(other.since_) {}

Scheduler::Lease::~Lease() {
  if (scheduler_ != nullptr) scheduler_->release(*this);
}

Scheduler::Duration Scheduler::Lease::end() {
  return std::exchange(scheduler_, nullptr)->release(*this);
}

/// The first of begin .. end-1 that is free and not taken out, or -1.
int32_t Scheduler::find_free_core(const Group& group, int32_t begin, int32_t end) const {
  for (int32_t at = begin; at < end; at = (at / kWordBits + 1) * kWordBits) {
    uint64_t word = free_[at / kWordBits];
    if (!group.out_.empty()) word &= ~group.out_[at / kWordBits];
    word >>= at % kWordBits;
    if (word == 0) continue;
    const int32_t core = at + std::countr_zero(word);
    return core < end ? core : -1;
  }
  return -1;
}

/// Marks the group's next free core busy and returns it, or -1.
int32_t Scheduler::take_free_core(Group& group) {
  const int32_t next = group.first_core_ + group.next_;
  int32_t core = find_free_core(group, next, group.first_core_ + group.count_);
  if (core < 0) core = find_free_core(group, group.first_core_, next);
  if (core < 0) return -1;
  free_[core / kWordBits] &= ~bit_of(core);
  ++busy_cores_;
  group.next_ = (core - group.first_core_ + 1) % group.count_;
  return core;
}

bool Scheduler::all_silent(const Group& group) const {
  if (silent_cores_ < group.count_) return false;
  const auto first = cores_.begin() + group.first_core_;
  return std::all_of(first, first + group.count_, [](const auto& core) { return core->silent; });
}

bool Scheduler::is_out(const Group& group, int32_t core) {
  return !group.out_.empty() && (group.out_[core / kWordBits] & bit_of(core)) != 0;
}

void Scheduler::set_out(Group& group, int32_t core, bool out) {
  uint64_t& word = group.out_[core / kWordBits];
  word = out ? word | bit_of(core) : word & ~bit_of(core);
}

bool Scheduler::may_compute(const Group& group, int32_t core) const {
  return !is_out(group, core) && !cores_[core]->silent;
}

bool Scheduler::any_may_compute(const Group& group) const {
  for (int32_t i = 0; i < group.count_; ++i) {
    if (may_compute(group, group.first_core_ + i)) return true;
  }
  return false;
}

bool Scheduler::take_out(Group& group, int32_t replica) {
  const int32_t core = group.first_core_ + replica;
  MutexLock lock(mutex_);
  if (is_out(group, core)) return true;
  if (group.out_.empty()) group.out_.resize(free_.size());
  set_out(group, core, true);
  if (any_may_compute(group)) return true;
  set_out(group, core, false);
  return false;
}

void Scheduler::put_back(Group& group, int32_t replica) {
  const int32_t core = group.first_core_ + replica;
  MutexLock lock(mutex_);
  if (!is_out(group, core)) return;
  set_out(group, core, false);
  if (std::ranges::all_of(group.out_, [](uint64_t word) { return word == 0; })) group.out_.clear();
  serve_queue(core);
}

bool Scheduler::quarantined(const Group& group, int32_t replica) const {
  MutexLock lock(mutex_);
  return !may_compute(group, group.first_core_ + replica);
}

/// Gives a core that may be free, and was kept from a group, what waits for it.
void Scheduler::serve_queue(int32_t core_index) {
  uint64_t& word = free_[core_index / kWordBits];
  if (closed_ || (word & bit_of(core_index)) == 0) return;
  Core& core = *cores_[core_index];
  core.next = pop_oldest(core_index);
  if (core.next == nullptr) return;
  word &= ~bit_of(core_index);
  ++busy_cores_;
  core.wake.notify_one();
}

/// The queued job that has waited longest of those the core may compute, or null.
std::shared_ptr<Job> Scheduler::pop_oldest(int32_t core_index) {
  Group* oldest = nullptr;
  for (Group* group : cores_[core_index]->groups) {
    if (group->queue_.empty() || is_out(*group, core_index)) continue;
    if (oldest == nullptr || group->queue_.front()->ticket_ < oldest->queue_.front()->ticket_) {
      oldest = group;
    }
  }
  if (oldest == nullptr) return nullptr;
  std::shared_ptr<Job> job = std::move(oldest->queue_.front());
  oldest->queue_.pop_front();
  --queued_jobs_;
  oldest->next_ = (core_index - oldest->first_core_ + 1) % oldest->count_;
  return job;
}

/// Books the inference that ended, gives the core to the next one, if any, and returns how long it
/// took.
Scheduler::Duration Scheduler::finished(int32_t core_index, Clock::time_point since) {
  Core& core = *cores_[core_index];
  const Duration took = Clock::now() - since;
  ++core.counts.executions;
  core.counts.busy += took;
  core.released = since + took;
  if (std::exchange(core.silent, false)) --silent_cores_;
  core.next = closed_ ? nullptr : pop_oldest(core_index);
  if (core.next != nullptr) {
    // The core stays busy; its own thread, which start() made, goes on, whoever held it until now.
    core.wake.notify_one();
    return took;
  }
  free_[core_index / kWordBits] |= bit_of(core_index);
  if (--busy_cores_ == 0) idle_.notify_all();
  return took;
}

/// Makes the core that the calling thread leased last the group's next one, if the one whose turn
/// it is was last held by another thread, which computed at the same time and goes on. That thread
/// is on the core's CPU, with its Python or asleep there, and this one would be bound to it too,
/// while its own CPU idles. Callers that come one after another go round robin, whoever they are.
void Scheduler::stay_on_own_core(Group& group, const std::shared_ptr<Caller>& caller) {
  const int32_t own = caller->core;
  if (own < group.first_core_ || own >= group.first_core_ + group.count_) return;
  if (cores_[own]->holder.lock() != caller || find_free_core(group, own, own + 1) < 0) return;
  const Core& next = *cores_[group.first_core_ + group.next_];
  const auto other = next.holder.lock();
  if (other == nullptr || other == caller || next.released < caller->since) return;
  group.next_ = own - group.first_core_;
}

std::optional<Scheduler::Lease> Scheduler::try_lease(Group& group, bool bound) {
  const auto caller = bound ? Caller::this_thread() : nullptr;
  MutexLock lock(mutex_);
  if (caller != nullptr && group.count_ > 1) stay_on_own_core(group, caller);
  const int32_t core = take_free_core(group);
  if (core < 0) return std::nullopt;
  Lease lease(*this, core, core - group.first_core_);
  cores_[core]->holder = caller;
  if (caller != nullptr) *caller = {core, lease.since_};
  return lease;
}

Scheduler::Duration Scheduler::release(const Lease& lease) {
  MutexLock lock(mutex_);
  return finished(lease.core_, lease.since_);
}

void Scheduler::run(Group& group, const std::shared_ptr<Job>& job, Duration timeout) {
  start(group, job);
  await(*job, timeout);
}

/// Gives the job to a free core of the group, or queues it.
void Scheduler::start(Group& group, const std::shared_ptr<Job>& job) {
  MutexLock lock(mutex_);
  if (all_silent(group)) {
    throw std::runtime_error(
        "no core of this subgraph answers: an inference ran past NEURON_RT_EXEC_TIMEOUT on each "
        "and has not come back; move the module to other cores with set_neuron_cores");
  }
  // Before anything is marked, so that a refused thread leaves all as it was.
  if (!group.has_threads_) start_threads(group);
  job->ticket_ = next_ticket_++;
  job->first_core_ = group.first_core_;
  const int32_t core_index = take_free_core(group);
  if (core_index < 0) {
    group.queue_.push_back(job);
    ++queued_jobs_;
    return;
  }
  cores_[core_index]->next = job;
  cores_[core_index]->wake.notify_one();
}

/// Every core of the group may be asked to take over a queued job.
void Scheduler::start_threads(Group& group) {
  for (int32_t i = 0; i < group.count_; ++i) {
    Core& core = *cores_[group.first_core_ + i];
    if (core.thread.joinable()) continue;
    core.thread = std::thread(&Scheduler::core_thread, this, group.first_core_ + i);
    pthread_setname_np(core.thread.native_handle(), message("nc", group.first_core_ + i).c_str());
  }
  group.has_threads_ = true;
}

void Scheduler::await(Job& job, Duration timeout) {
  for (;;) {
    bool overdue = false;
    {
      MutexLock lock(job.mutex_);
      while (job.state_ != Job::State::kDone && job.state_ != Job::State::kRefused && !overdue) {
        if (timeout == Duration::zero()) {
          job.changed_.wait(job.mutex_);
          continue;
        }
        // Nobody wakes us when the job begins, which would cost each call a wake-up: while it is
        // queued it cannot be overdue before a whole timeout has passed.
        const auto begin = job.state_ == Job::State::kRunning ? job.started_ : Clock::now();
        overdue = Clock::now() >= begin + timeout;
        if (!overdue) job.changed_.wait_until(job.mutex_, begin + timeout);
      }
      if (job.state_ == Job::State::kDone) return;
      if (job.state_ == Job::State::kRefused) {
        throw std::runtime_error(
            "no core of this subgraph answers any more: the inference was given up while it "
            "waited");
      }
    }
    if (silence_if_running(job)) {
      const double seconds = std::chrono::duration<double>(timeout).count();
      throw std::runtime_error(message("the inference did not end within ", seconds,
                                       " s (NEURON_RT_EXEC_TIMEOUT); its core takes no other until "
                                       "it comes back"));
    }
  }
}

/// Keeps new work from the core of an overdue job. Work that no other core may do is refused.
bool Scheduler::silence_if_running(Job& job) {
  // Destroyed after the lock is gone: a job may own the last reference to its group.
  std::deque<std::shared_ptr<Job>> refused;
  MutexLock lock(mutex_);
  int32_t core_index = -1;
  {
    MutexLock job_lock(job.mutex_);
    if (job.state_ != Job::State::kRunning) return false;
    core_index = job.core_;
  }
  Core& core = *cores_[core_index];
  if (!std::exchange(core.silent, true)) ++silent_cores_;
  for (Group* group : core.groups) {
    if (any_may_compute(*group)) continue;
    // Rather replicas that failed than none.
    const std::vector<uint64_t> out = std::exchange(group->out_, {});
    for (int32_t i = 0; !out.empty() && i < group->count_; ++i) {
      serve_queue(group->first_core_ + i);
    }
    if (!all_silent(*group)) continue;
    for (auto& queued : group->queue_) {
      MutexLock job_lock(queued->mutex_);
      queued->state_ = Job::State::kRefused;
      queued->changed_.notify_all();
      refused.push_back(queued);
    }
    queued_jobs_ -= static_cast<int32_t>(group->queue_.size());
    group->queue_.clear();
  }
  return true;
}

void Scheduler::core_thread(int32_t core_index) {
  on_core_thread_(core_index);
  for (;;) {
    std::shared_ptr<Job> job;
    {
      MutexLock lock(mutex_);
      Core& core = *cores_[core_index];
      while (core.next == nullptr && !stopping_) core.wake.wait(mutex_);
      job = std::exchange(core.next, nullptr);
      core.holder.reset();
    }
    if (job == nullptr) return;
    const auto since = Clock::now();
    {
      MutexLock lock(job->mutex_);
      job->state_ = Job::State::kRunning;
      job->started_ = since;
      job->core_ = core_index;
    }
    job->run(core_index - job->first_core_);
    {
      // The core is free before the caller learns that it is done: its next call finds it so.
      MutexLock lock(mutex_);
      finished(core_index, since);
      MutexLock job_lock(job->mutex_);
      job->state_ = Job::State::kDone;
      job->changed_.notify_all();
    }
  }
}

Scheduler::CoreCounts Scheduler::counts(int32_t core) const {
  MutexLock lock(mutex_);
  CoreCounts counts = cores_[core]->counts;
  counts.quarantined = std::ranges::any_of(
      cores_[core]->groups, [&](const Group* group) { return is_out(*group, core); });
  if (cores_[core]->silent) counts.quarantined = true;
  return counts;
}

int32_t Scheduler::busy() const {
  MutexLock lock(mutex_);
  return busy_cores_;
}

int32_t Scheduler::queued() const {
  MutexLock lock(mutex_);
  return queued_jobs_;
}

bool Scheduler::close_until(Clock::time_point deadline) {
  MutexLock lock(mutex_);
  closed_ = true;
  while (busy_cores_ > 0) {
    if (Clock::now() >= deadline) return false;
    idle_.wait_until(mutex_, deadline);
  }
  return true;
}

}  // namespace neuron::runtime
