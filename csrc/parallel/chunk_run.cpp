#include "parallel/chunk_run.h"

#include <ATen/ThreadLocalState.h>

#include <algorithm>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "runtime/runtime.h"

namespace neuron::parallel {

ChunkRun::ChunkRun(size_t count, std::function<void(size_t)> work)
    : count_(count), work_(std::move(work)) {}

void ChunkRun::run(runtime::ThreadPool& pool, size_t workers) {
  // Gradient mode and the like are the caller's in every chunk.
  const at::ThreadLocalState settings;
  for (size_t i = 1; i < std::min(count_, workers); ++i) {
    try {
      pool.submit([self = shared_from_this(), settings] {
        const runtime::ExitGate::Exempt returns_to_no_one;
        const at::ThreadLocalStateGuard as_caller(settings);
        self->take_chunks();
      });
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those there are do the work
    }
  }
  take_chunks();
  MutexLock lock(mutex_);
  while (running_ > 0) idle_.wait(mutex_);
  if (failure_ != nullptr) std::rethrow_exception(failure_);
  if (next_ < count_) {
    throw std::runtime_error("the process ends: no chunk of a DataParallel call begins any more");
  }
}

void ChunkRun::take_chunks() {
  size_t chunk = 0;
  while (take(chunk)) {
    std::exception_ptr error;
    try {
      work_(chunk);
    } catch (...) {
      error = std::current_exception();
    }
    finish(chunk, std::move(error));
  }
}

bool ChunkRun::take(size_t& chunk) {
  MutexLock lock(mutex_);
  if (next_ == count_ || failure_ != nullptr || runtime::Runtime::closing()) return false;
  chunk = next_++;
  ++running_;
  return true;
}

void ChunkRun::finish(size_t chunk, std::exception_ptr error) {
  MutexLock lock(mutex_);
  if (error != nullptr && (failure_ == nullptr || chunk < failed_chunk_)) {
    failure_ = std::move(error);
    failed_chunk_ = chunk;
  }
  if (--running_ == 0) idle_.notify_all();
}

}  // namespace neuron::parallel
