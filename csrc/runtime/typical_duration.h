#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace neuron::runtime {

/// How long something usually takes, by the slower of the last time and what was typical, which
/// fades: one slow first time does not count for ever, a slow one counts at once. Thread-safe; of
/// notes at the same moment one may be lost.
class TypicalDuration {
 public:
  void note(std::chrono::nanoseconds took) {
    const int64_t typical = ns_.load(std::memory_order_relaxed);
    const int64_t last = took.count();
    ns_.store(typical < 0 ? last : std::max(last, typical - typical / 4),
              std::memory_order_relaxed);
  }

  /// Whether `count` of them, one after another, take less than `limit`. False as long as nothing
  /// is known.
  bool below(std::chrono::nanoseconds limit, int64_t count = 1) const {
    const int64_t typical = ns_.load(std::memory_order_relaxed);
    return typical >= 0 && typical < limit.count() / std::max<int64_t>(count, 1);
  }

 private:
  std::atomic<int64_t> ns_{-1};
};

/// Two wake-ups of threads: work that takes less is not worth handing over.
constexpr std::chrono::nanoseconds kHandOver{50'000};

}  // namespace neuron::runtime
