#pragma once

#include <cstdint>
#include <memory>

#include "common/mutex.h"

namespace neuron::runtime {

/// A thread that computes on cores which it is bound to. Lives as long as the thread.
struct Caller {
  /// The calling thread's; null when that is so far at its end that its own data are gone.
  static std::shared_ptr<Caller> this_thread();

  // What it leased last, guarded by the scheduler's mutex.
  int32_t core = -1;
  CondVar::Clock::time_point since;
};

}  // namespace neuron::runtime
