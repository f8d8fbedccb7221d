#include "runtime/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <future>
#include <mutex>
#include <semaphore>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace neuron::runtime {
namespace {

using namespace std::chrono_literals;
using Group = Scheduler::Group;

/// Runs what the test gives it.
class TestJob : public Job {
 public:
  explicit TestJob(std::function<void(int32_t)> body) : body_(std::move(body)) {}
  void run(int32_t replica) noexcept override { body_(replica); }

 private:
  const std::function<void(int32_t)> body_;
};

void run(Scheduler& scheduler, Group& group, std::function<void(int32_t)> body,
         Scheduler::Duration timeout = {}) {
  scheduler.run(group, std::make_shared<TestJob>(std::move(body)), timeout);
}

void ignore_core(int32_t) {}

TEST(Scheduler, OneCallerGoesRoundRobinFromTheFirstCore) {
  Scheduler scheduler(4, ignore_core);
  Group group(scheduler, 1, 3);
  std::vector<int32_t> replicas;
  for (int i = 0; i < 100; ++i) {
    run(scheduler, group, [&](int32_t replica) { replicas.push_back(replica); });
  }
  for (int i = 0; i < 100; ++i) ASSERT_EQ(replicas[i], i % 3) << i;
  EXPECT_EQ(scheduler.counts(0).executions, 0);
  EXPECT_EQ(scheduler.counts(1).executions, 34);
  EXPECT_EQ(scheduler.counts(3).executions, 33);
}

TEST(Scheduler, RoundRobinPastBusyCoresHoldsForAnyNumberOfCores) {
  // 64 free cores stand in one word of memory: windows that begin, end and wrap anywhere.
  Scheduler scheduler(200, ignore_core);
  for (const auto& [first, count] : {std::pair{0, 200}, {0, 64}, {63, 2}, {64, 64}, {1, 130}}) {
    Group group(scheduler, first, count);
    std::vector<Scheduler::Lease> held;
    for (int32_t replica = 0; replica < count; replica += 2) {  // every other core stays busy
      for (;;) {
        auto lease = scheduler.try_lease(group);
        ASSERT_TRUE(lease);
        if (lease->replica() == replica) {
          held.push_back(std::move(*lease));
          break;
        }
      }
    }
    std::vector<int32_t> free_ones;
    for (int32_t replica = 1; replica < count; replica += 2) free_ones.push_back(replica);
    const int32_t rounds = 3 * static_cast<int32_t>(free_ones.size());
    int32_t start = -1;
    for (int32_t i = 0; i < rounds; ++i) {
      const auto lease = scheduler.try_lease(group);
      ASSERT_TRUE(lease);
      const auto at = std::find(free_ones.begin(), free_ones.end(), lease->replica());
      ASSERT_NE(at, free_ones.end()) << lease->replica() << " is busy";
      const auto position = static_cast<int32_t>(at - free_ones.begin());
      if (start < 0) start = position;
      ASSERT_EQ(position, (start + i) % static_cast<int32_t>(free_ones.size())) << count;
    }
    EXPECT_EQ(scheduler.busy(), static_cast<int32_t>(held.size()));
  }
  EXPECT_EQ(scheduler.busy(), 0);
}

TEST(Scheduler, ALeaseThatEndsTellsHowLongItWasAndFreesItsCore) {
  Scheduler scheduler(1, ignore_core);
  Group group(scheduler, 0, 1);
  auto lease = scheduler.try_lease(group);
  ASSERT_TRUE(lease);
  EXPECT_FALSE(scheduler.try_lease(group));
  const auto took = lease->end();
  EXPECT_EQ(scheduler.counts(0).busy, took);
  EXPECT_EQ(scheduler.counts(0).executions, 1);
  EXPECT_TRUE(scheduler.try_lease(group));
}

TEST(Scheduler, LeasesAndJobsShareOneRoundRobin) {
  Scheduler scheduler(2, ignore_core);
  Group group(scheduler, 0, 2);
  for (int i = 0; i < 50; ++i) {
    int32_t replica = -1;
    run(scheduler, group, [&](int32_t r) { replica = r; });
    ASSERT_EQ(replica, 0);
    const auto lease = scheduler.try_lease(group);
    ASSERT_TRUE(lease);
    ASSERT_EQ(lease->replica(), 1);
  }
}

TEST(Scheduler, PassesBusyCoresBy) {
  Scheduler scheduler(3, ignore_core);
  Group group(scheduler, 0, 3);
  const auto first = scheduler.try_lease(group);
  const auto second = scheduler.try_lease(group);
  ASSERT_TRUE(first && second);
  for (int i = 0; i < 5; ++i) {
    int32_t replica = -1;
    run(scheduler, group, [&](int32_t r) { replica = r; });
    EXPECT_EQ(replica, 2);
  }
  const auto third = scheduler.try_lease(group);
  ASSERT_TRUE(third);
  EXPECT_FALSE(scheduler.try_lease(group));
}

TEST(Scheduler, ACoreComputesOneInferenceAtATimeAcrossGroups) {
  Scheduler scheduler(2, ignore_core);
  Group left(scheduler, 0, 1);
  Group both(scheduler, 0, 2);
  Group right(scheduler, 1, 1);
  std::vector<std::atomic<int>> on_core(2);
  std::atomic<int> overlaps{0};
  std::atomic<int> done{0};
  const auto caller = [&](Group& group, int32_t first_core, bool lease_first) {
    for (int i = 0; i < 300; ++i) {
      const auto compute = [&](int32_t replica) {
        auto& busy = on_core[first_core + replica];
        if (busy.fetch_add(1) != 0) ++overlaps;
        std::this_thread::yield();
        busy.fetch_sub(1);
        ++done;
      };
      if (lease_first) {
        if (const auto lease = scheduler.try_lease(group)) {
          compute(lease->replica());
          continue;
        }
      }
      run(scheduler, group, compute);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] { caller(left, 0, true); });
    threads.emplace_back([&] { caller(both, 0, false); });
    threads.emplace_back([&] { caller(both, 0, true); });
    threads.emplace_back([&] { caller(right, 1, true); });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(overlaps, 0);
  EXPECT_EQ(done, 8 * 300);
  EXPECT_EQ(scheduler.counts(0).executions + scheduler.counts(1).executions, 8 * 300);
}

TEST(Scheduler, QueuedJobsRunInTheOrderTheyCame) {
  Scheduler scheduler(1, ignore_core);
  Group one(scheduler, 0, 1);
  Group other(scheduler, 0, 1);
  std::vector<int> order;
  std::vector<std::thread> callers;
  {
    const auto lease = scheduler.try_lease(one);
    ASSERT_TRUE(lease);
    for (int i = 0; i < 10; ++i) {
      // The jobs run after the lease ends, so the core's thread alone writes `order`.
      callers.emplace_back([&, i] {
        run(scheduler, i % 2 == 0 ? one : other, [&order, i](int32_t) { order.push_back(i); });
      });
      while (scheduler.queued() != i + 1) std::this_thread::yield();
    }
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
}

TEST(Scheduler, AFreedCoreServesAWaiterThatNamesSeveral) {
  Scheduler scheduler(2, ignore_core);
  Group group(scheduler, 0, 2);
  std::thread caller;
  std::atomic<int32_t> ran_on{-1};
  auto first = scheduler.try_lease(group);
  {
    auto lease = scheduler.try_lease(group);
    caller = std::thread([&] { run(scheduler, group, [&](int32_t r) { ran_on = r; }); });
    while (scheduler.queued() != 1) std::this_thread::yield();
  }
  caller.join();
  EXPECT_EQ(ran_on, 1);
}

TEST(Scheduler, SetsUpEachCoreThreadOnce) {
  std::mutex mutex;
  std::vector<int32_t> set_up;
  {
    Scheduler scheduler(3, [&](int32_t core) {
      const std::lock_guard lock(mutex);
      set_up.push_back(core);
    });
    Group group(scheduler, 0, 3);
    for (int i = 0; i < 9; ++i) run(scheduler, group, ignore_core);
  }
  std::sort(set_up.begin(), set_up.end());
  EXPECT_EQ(set_up, (std::vector<int32_t>{0, 1, 2}));
}

TEST(Scheduler, AnOverdueInferenceFailsItsCallerAndItsCoreIsPassedBy) {
  Scheduler scheduler(2, ignore_core);
  Group group(scheduler, 0, 2);
  std::binary_semaphore come_back(0);
  std::binary_semaphore came_back(0);
  EXPECT_THROW(run(
                   scheduler, group,
                   [&](int32_t) {
                     come_back.acquire();
                     came_back.release();
                   },
                   20ms),
               std::runtime_error);
  for (int i = 0; i < 5; ++i) {
    int32_t replica = -1;
    run(scheduler, group, [&](int32_t r) { replica = r; }, 10s);
    EXPECT_EQ(replica, 1);
  }
  come_back.release();
  came_back.acquire();
  ASSERT_TRUE(scheduler.close_until(CondVar::Clock::now() + 60s));
  EXPECT_EQ(scheduler.counts(0).executions, 1);
}

TEST(Scheduler, CallersOfAGroupWhoseCoresAllAreSilentFailAtOnce) {
  Scheduler scheduler(1, ignore_core);
  Group group(scheduler, 0, 1);
  std::binary_semaphore come_back(0);
  auto overdue = std::async(std::launch::async, [&] {
    run(scheduler, group, [&](int32_t) { come_back.acquire(); }, 50ms);
  });
  auto queued = std::async(std::launch::async, [&] {
    while (scheduler.busy() == 0) std::this_thread::yield();
    run(scheduler, group, ignore_core, 10s);
  });
  EXPECT_THROW(overdue.get(), std::runtime_error);
  EXPECT_THROW(queued.get(), std::runtime_error);
  EXPECT_THROW(run(scheduler, group, ignore_core), std::runtime_error);
  come_back.release();
  while (scheduler.busy() != 0) std::this_thread::yield();
  int32_t replica = -1;
  run(scheduler, group, [&](int32_t r) { replica = r; });
  EXPECT_EQ(replica, 0);
}

TEST(Scheduler, ManyCallersOnManyCoresAllGetTheirs) {
  constexpr int32_t kCores = 32;
  constexpr int32_t kCallers = 100;
  Scheduler scheduler(kCores, ignore_core);
  Group group(scheduler, 0, kCores);
  std::vector<std::thread> callers;
  std::vector<int> sums(kCallers, 0);
  for (int32_t id = 0; id < kCallers; ++id) {
    callers.emplace_back([&, id] {
      for (int i = 1; i <= 20; ++i) {
        run(scheduler, group, [&sum = sums[id], i](int32_t) { sum += i; });
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(sums, std::vector<int>(kCallers, 210));
}

TEST(Scheduler, CloseWaitsForWhatRuns) {
  Scheduler scheduler(1, ignore_core);
  Group group(scheduler, 0, 1);
  {
    const auto lease = scheduler.try_lease(group);
    EXPECT_FALSE(scheduler.close_until(CondVar::Clock::now()));
  }
  EXPECT_TRUE(scheduler.close_until(CondVar::Clock::now() + 60s));
}

}  // namespace
}  // namespace neuron::runtime
