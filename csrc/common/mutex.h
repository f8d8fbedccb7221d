#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

// Clang's thread-safety analysis checks these; other compilers ignore them.
#if defined(__clang__)
#define NEURON_TSA(x) __attribute__((x))
#else
#define NEURON_TSA(x)
#endif
#define GUARDED_BY(x) NEURON_TSA(guarded_by(x))
#define REQUIRES(...) NEURON_TSA(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) NEURON_TSA(locks_excluded(__VA_ARGS__))

namespace neuron {

/// std::mutex with the annotations that libstdc++'s lacks.
class NEURON_TSA(capability("mutex")) Mutex {
 public:
  void lock() NEURON_TSA(acquire_capability()) { mutex_.lock(); }
  void unlock() NEURON_TSA(release_capability()) { mutex_.unlock(); }

 private:
  friend class CondVar;
  std::mutex mutex_;
};

class NEURON_TSA(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) NEURON_TSA(acquire_capability(mutex)) : mutex_(mutex) {
    mutex_.lock();
  }
  ~MutexLock() NEURON_TSA(release_capability()) { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

/// Waits may wake up without cause: callers loop over their condition.
class CondVar {
 public:
  using Clock = std::chrono::steady_clock;

  void wait(Mutex& mutex) REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    cv_.wait(lock);
    lock.release();
  }
  void wait_until(Mutex& mutex, Clock::time_point deadline) REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    cv_.wait_until(lock, deadline);
    lock.release();
  }
  void notify_one() { cv_.notify_one(); }
  void notify_all() { cv_.notify_all(); }

 private:
  std::condition_variable cv_;
};

}  // namespace neuron
