#include "runtime/loader.h"

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

TEST(Loader, TasksOverlapUpToTheBound) {
  std::barrier together(4);  // passes only if four tasks run at once
  std::latch done(4);
  Loader loader(4);
  for (int i = 0; i < 4; ++i) {
    loader.submit([&] {
      together.arrive_and_wait();
      done.count_down();
    });
  }
  done.wait();
}

TEST(Loader, MoreTasksThanThreadsAllRunInOrder) {
  std::vector<int> order;
  std::latch done(50);
  Loader loader(1);
  for (int i = 0; i < 50; ++i) {
    loader.submit([&, i] {
      order.push_back(i);
      done.count_down();
    });
  }
  done.wait();
  std::vector<int> expected(50);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(order, expected);
}

TEST(Loader, NeverRunsMoreTasksAtOnceThanItsBound) {
  std::atomic<int> running{0};
  std::atomic<int> most{0};
  std::latch done(40);
  Loader loader(3);
  for (int i = 0; i < 40; ++i) {
    loader.submit([&] {
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

TEST(Loader, StopsWithoutWhatHasNotBegun) {
  std::atomic<int> ran{0};
  std::binary_semaphore began(0);
  std::binary_semaphore go_on(0);
  {
    Loader loader(1);
    loader.submit([&] {
      began.release();
      go_on.acquire();
      ++ran;
    });
    loader.submit([&] { ++ran; });
    began.acquire();
    EXPECT_FALSE(loader.stop_until(CondVar::Clock::now()));
    go_on.release();
    EXPECT_TRUE(loader.stop_until(CondVar::Clock::now() + 60s));
    EXPECT_THROW(loader.submit([] {}), std::runtime_error);
  }
  EXPECT_EQ(ran, 1);
}

}  // namespace
}  // namespace neuron::runtime
