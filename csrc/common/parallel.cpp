#include "common/parallel.h"

#include <sched.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace neuron {
namespace {

// Reading memory is what is shared out here; more threads than this find none left of its speed.
constexpr size_t kMostThreads = 4;
constexpr size_t kLeastPart = size_t{16} << 20;

size_t usable_cpus() {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof(cpus), &cpus) != 0) return 1;
  return static_cast<size_t>(CPU_COUNT(&cpus));
}

}  // namespace

void in_parallel(size_t size, const std::function<void(size_t, size_t)>& part) {
  const size_t count = std::min({kMostThreads, usable_cpus(), size / kLeastPart});
  if (count < 2) return part(0, size);
  // Whole cache lines, so that no two threads read the same one.
  const size_t step = (size / count + 63) / 64 * 64;
  std::vector<std::thread> threads;
  size_t begin = step;  // the first part is the calling thread's
  try {
    for (; begin < size; begin += step) {
      threads.emplace_back(part, begin, std::min(begin + step, size));
    }
  } catch (const std::system_error&) {
    part(begin, size);  // no more threads to be had
  }
  part(0, step);
  for (auto& thread : threads) thread.join();
}

}  // namespace neuron
