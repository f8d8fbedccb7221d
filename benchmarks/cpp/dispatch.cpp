// What it costs to find a core for an inference, over cores that compute nothing: the scheduler of
// the package alone, so that a machine with two CPUs can stand for one with many cores.
//
//   dispatch CORES CALLERS WORK_US SECONDS
//
// CALLERS threads call for SECONDS; an inference keeps its core for WORK_US microseconds without
// using a CPU. With WORK_US of 0 the callers compute on their own threads, as brief inferences do.
// Prints one JSON object.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <latch>
#include <memory>
#include <thread>
#include <vector>

#include "runtime/scheduler.h"

namespace {

using Clock = std::chrono::steady_clock;
using neuron::runtime::Job;
using neuron::runtime::Scheduler;

class SleepJob : public Job {
 public:
  explicit SleepJob(std::chrono::microseconds work) : work_(work) {}
  void run(int32_t /*replica*/) noexcept override { std::this_thread::sleep_for(work_); }

 private:
  const std::chrono::microseconds work_;
};

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

struct Caller {
  int64_t calls = 0;
  std::vector<float> waits_ms;  ///< from the call to its return
};

double quantile(std::vector<float>& values, double at) {
  if (values.empty()) return 0;
  const auto index = static_cast<size_t>(at * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(index),
                   values.end());
  return values[index];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: dispatch CORES CALLERS WORK_US SECONDS\n");
    return 2;
  }
  const int32_t cores = std::atoi(argv[1]);
  const int32_t callers = std::atoi(argv[2]);
  const std::chrono::microseconds work(std::atoi(argv[3]));
  const std::chrono::duration<double> length(std::atof(argv[4]));
  if (cores < 1 || callers < 1 || work.count() < 0 || length.count() <= 0) {
    std::fprintf(stderr, "dispatch: cores and callers are 1 or more, times not negative\n");
    return 2;
  }

  Scheduler scheduler(cores, [](int32_t) {});
  Scheduler::Group group(scheduler, 0, cores);
  std::atomic<bool> stop{false};
  std::latch ready(callers + 1);
  std::vector<Caller> all(static_cast<size_t>(callers));
  std::vector<std::thread> threads;
  for (Caller& caller : all) {
    threads.emplace_back([&] {
      ready.arrive_and_wait();
      while (!stop.load(std::memory_order_relaxed)) {
        const auto begin = Clock::now();
        if (work.count() == 0) {
          if (!scheduler.try_lease(group)) continue;
        } else {
          scheduler.run(group, std::make_shared<SleepJob>(work), {});
          const std::chrono::duration<float, std::milli> took = Clock::now() - begin;
          caller.waits_ms.push_back(took.count());
        }
        ++caller.calls;
      }
    });
  }
  ready.arrive_and_wait();
  const double cpu_before = cpu_seconds();
  const auto begin = Clock::now();
  std::this_thread::sleep_for(length);
  stop = true;
  for (auto& thread : threads) thread.join();  // who has begun to call is served
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  const double cpu = cpu_seconds() - cpu_before;

  int64_t calls = 0;
  std::vector<float> waits;
  std::vector<float> per_caller;
  for (const Caller& caller : all) {
    calls += caller.calls;
    per_caller.push_back(static_cast<float>(caller.calls));
    waits.insert(waits.end(), caller.waits_ms.begin(), caller.waits_ms.end());
  }
  std::printf(
      "{\"calls\": %lld, \"seconds\": %.4f, \"cpu_us_per_call\": %.4f, \"fewest_calls\": %.0f, "
      "\"median_calls\": %.0f, \"most_calls\": %.0f, \"p50_ms\": %.3f, \"p99_ms\": %.3f, "
      "\"max_ms\": %.3f}\n",
      static_cast<long long>(calls), seconds, cpu / static_cast<double>(calls) * 1e6,
      quantile(per_caller, 0), quantile(per_caller, 0.5), quantile(per_caller, 1),
      quantile(waits, 0.5), quantile(waits, 0.99), quantile(waits, 1));
  return 0;
}
