#include "runtime/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <latch>
#include <mutex>
#include <numeric>
#include <semaphore>

namespace neuron::runtime {
namespace {

using namespace std::chrono_literals;

TEST(ThreadPool, TasksOverlapUpToTheBound) {
  std::barrier together(4);  // passes only if four tasks run at once
  std::latch done(4);
  ThreadPool pool("test", 4);
  for (int i = 0; i < 4; ++i) {
    pool.submit([&] {
      together.arrive_and_wait();
      done.count_down();
    });
  }
  done.wait();
}

TEST(ThreadPool, MoreTasksThanThreadsAllRunInOrder) {
  std::vector<int> order;
  std::latch done(50);
  ThreadPool pool("test", 1);
  for (int i = 0; i < 50; ++i) {
    pool.submit([&, i] {
      order.push_back(i);
      done.count_down();
    });
  }
  done.wait();
  std::vector<int> expected(50);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(order, expected);
}

TEST(ThreadPool, NeverRunsMoreTasksAtOnceThanItsBound) {
  std::atomic<int> running{0};
  std::atomic<int> most{0};
  std::latch done(40);
  ThreadPool pool("test", 3);
  for (int i = 0; i < 40; ++i) {
    pool.submit([&] {
      const int now = ++running;
      int seen = most.load();
      while (seen < now && !most.compare_exchange_weak(seen, now)) {
      }
      std::this_thread::yield();
      --running;
      done.count_down();
    });
  }
  done.wait();
  EXPECT_GE(most, 1);
  EXPECT_LE(most, 3);
}

TEST(ThreadPool, StopsWithoutWhatHasNotBegun) {
  std::atomic<int> ran{0};
  std::binary_semaphore began(0);
  std::binary_semaphore go_on(0);
  {
    ThreadPool pool("test", 1);
    pool.submit([&] {
      began.release();
      go_on.acquire();
      ++ran;
    });
    pool.submit([&] { ++ran; });
    began.acquire();
    EXPECT_FALSE(pool.stop_until(CondVar::Clock::now()));
    go_on.release();
    EXPECT_TRUE(pool.stop_until(CondVar::Clock::now() + 60s));
    EXPECT_THROW(pool.submit([] {}), std::runtime_error);
  }
  EXPECT_EQ(ran, 1);
}

}  // namespace
}  // namespace neuron::runtime
