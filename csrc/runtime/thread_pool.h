#pragma once

#include <deque>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "common/mutex.h"

namespace neuron::runtime {

/// Threads for tasks in the background. They start as they are needed, up to a bound, and stay.
/// Thread-safe.
class ThreadPool {
 public:
  /// @param name of its threads, at most 15 characters.
  ThreadPool(std::string name, int32_t max_threads)
      : name_(std::move(name)), max_threads_(max_threads) {}

  /// Waits for the tasks that run; those not begun are dropped.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Has a thread call `task`, which must not throw. Tasks begin in order.
  /// @throws std::system_error if there is no thread and none can be made; std::runtime_error after
  /// `stop_until`.
  void submit(std::function<void()> task);

  /// Begins no more tasks and waits for those that run, at most until `deadline`.
  bool stop_until(CondVar::Clock::time_point deadline);

 private:
  void thread_main();

  const std::string name_;
  const int32_t max_threads_;
  Mutex mutex_;
  CondVar work_;
  CondVar idle_;
  std::deque<std::function<void()>> tasks_ GUARDED_BY(mutex_);
  std::vector<std::thread> threads_ GUARDED_BY(mutex_);
  int32_t running_ GUARDED_BY(mutex_) = 0;
  bool stopping_ GUARDED_BY(mutex_) = false;
};

}  // namespace neuron::runtime
