#include "runtime/thread_pool.h"

#include <pthread.h>

#include <stdexcept>
#include <utility>

namespace neuron::runtime {

ThreadPool::~ThreadPool() {
  std::vector<std::thread> threads;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    tasks_.clear();
    work_.notify_all();
    threads = std::move(threads_);
  }
  for (auto& thread : threads) thread.join();
}

void ThreadPool::submit(std::function<void()> task) {
  MutexLock lock(mutex_);
  if (stopping_) {
    throw std::runtime_error("nothing begins in the background any more: the process ends");
  }
  const auto under_way = running_ + static_cast<int32_t>(tasks_.size());
  const auto threads = static_cast<int32_t>(threads_.size());
  if (under_way >= threads && threads < max_threads_) {
    try {
      threads_.emplace_back(&ThreadPool::thread_main, this);
      // Here rather than on the thread: what counts threads by name never sees one without.
      pthread_setname_np(threads_.back().native_handle(), name_.c_str());
    } catch (const std::system_error&) {
      if (threads == 0) throw;
    }
  }
  tasks_.push_back(std::move(task));
  work_.notify_one();
}

bool ThreadPool::stop_until(CondVar::Clock::time_point deadline) {
  MutexLock lock(mutex_);
  stopping_ = true;
  tasks_.clear();
  work_.notify_all();
  while (running_ > 0) {
    if (CondVar::Clock::now() >= deadline) return false;
    idle_.wait_until(mutex_, deadline);
  }
  return true;
}

void ThreadPool::thread_main() {
  for (;;) {
    std::function<void()> task;
    {
      MutexLock lock(mutex_);
      while (tasks_.empty() && !stopping_) work_.wait(mutex_);
      if (stopping_) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
      ++running_;
    }
    task();
    task = nullptr;  // what it holds may unload a replica: still part of the task
    MutexLock lock(mutex_);
    if (--running_ == 0) idle_.notify_all();
  }
}

}  // namespace neuron::runtime
