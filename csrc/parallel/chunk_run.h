#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>

#include "common/mutex.h"
#include "runtime/thread_pool.h"

namespace neuron::parallel {

/// Runs the chunks of one call: on the thread that calls, and on threads of a pool as they come.
/// The caller waits for no thread that has not taken a chunk, so short calls end without the pool.
/// Thread-safe.
class ChunkRun : public std::enable_shared_from_this<ChunkRun> {
 public:
  /// @param work computes one chunk; may throw. Called by several threads at once. What it refers
  /// to must live until `run` returns.
  ChunkRun(size_t count, std::function<void(size_t chunk)> work);

  /// Runs every chunk, on at most `workers` threads.
  /// @throws what a chunk threw, when none runs any more; none begins after one failed. Chunks
  /// begin in order, so it is always the first one, in that order, of those that fail.
  void run(runtime::ThreadPool& pool, size_t workers);

 private:
  void take_chunks() EXCLUDES(mutex_);
  bool take(size_t& chunk) EXCLUDES(mutex_);
  void finish(size_t chunk, std::exception_ptr error) EXCLUDES(mutex_);

  const size_t count_;
  const std::function<void(size_t)> work_;
  Mutex mutex_;
  CondVar idle_;
  size_t next_ GUARDED_BY(mutex_) = 0;
  size_t running_ GUARDED_BY(mutex_) = 0;
  std::exception_ptr failure_ GUARDED_BY(mutex_);
  size_t failed_chunk_ GUARDED_BY(mutex_) = 0;
};

}  // namespace neuron::parallel
