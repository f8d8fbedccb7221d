#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstddef>
#include <map>
#include <memory>

#include "common/mutex.h"
#include "runtime/typical_duration.h"

namespace neuron::parallel {

/// What a chunk of each model usually takes. Copies of a model, which have its class, share that;
/// every trace and every load makes a class of its own. Thread-safe.
class ChunkTimes {
 public:
  /// Of the process; never destroyed.
  static ChunkTimes& get();

  std::shared_ptr<runtime::TypicalDuration> of(const torch::jit::Module& model) EXCLUDES(mutex_);

  /// How many classes are known. Those that are gone are forgotten when a new one comes.
  size_t size() const EXCLUDES(mutex_);

 private:
  using Class = std::weak_ptr<c10::ClassType>;

  mutable Mutex mutex_;
  // By the class itself: another may get its address once it is gone.
  std::map<Class, std::shared_ptr<runtime::TypicalDuration>, std::owner_less<Class>> of_class_
      GUARDED_BY(mutex_);
};

}  // namespace neuron::parallel
