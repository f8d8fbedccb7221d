#include "subgraph/held_gate.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <latch>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace neuron::subgraph {
namespace {

using Mode = HeldGate::Mode;
using GatePtr = std::shared_ptr<HeldGate>;

GatePtr gate() {
  return std::make_shared<HeldGate>();
}

void run(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (auto& thread : threads) thread.join();
}

void until_waiting(const GatePtr& gate, size_t count) {
  while (gate->waiting() != count) std::this_thread::yield();
}

TEST(HeldGate, ReadersAreInsideTogether) {
  const GatePtr one = gate();
  std::latch inside(4);
  run(4, [&](int) {
    const GateScope scope({{one, Mode::kShared}});
    inside.arrive_and_wait();  // only where all four are inside at once
  });
  SUCCEED();
}

TEST(HeldGate, NobodySeesHalfOfAWrite) {
  const GatePtr one = gate();
  int64_t left = 0;
  int64_t right = 0;
  int64_t written = 0;
  std::atomic<int> torn{0};
  run(6, [&](int thread) {
    for (int i = 0; i < 2000; ++i) {
      if (thread % 3 == 0) {
        const GateScope scope({{one, Mode::kExclusive}});
        ++left;
        ++written;
        ++right;
      } else {
        const GateScope scope({{one, Mode::kShared}});
        if (left != right) ++torn;
      }
    }
  });
  EXPECT_EQ(torn, 0);
  EXPECT_EQ(written, 4000);
  EXPECT_EQ(left, 4000);
}

TEST(HeldGate, AWriterGetsInBetweenReadersWithoutEnd) {
  const GatePtr one = gate();
  std::atomic<bool> written{false};
  std::latch reading(3);
  run(4, [&](int thread) {
    if (thread == 0) {
      reading.wait();
      const GateScope scope({{one, Mode::kExclusive}});
      written = true;
      return;
    }
    bool counted = false;
    while (!written) {  // readers end with the write and not before
      const GateScope scope({{one, Mode::kShared}});
      if (!counted) reading.count_down();
      counted = true;
    }
  });
  EXPECT_TRUE(written);
}

TEST(HeldGate, AReaderGetsInBetweenWritersWithoutEnd) {
  const GatePtr one = gate();
  std::atomic<bool> read{false};
  run(4, [&](int thread) {
    if (thread == 0) {
      const GateScope scope({{one, Mode::kShared}});
      read = true;
      return;
    }
    while (!read) const GateScope scope({{one, Mode::kExclusive}});
  });
  EXPECT_TRUE(read);
}

TEST(HeldGate, ReadersAndWritersGoInTheOrderInWhichTheyCame) {
  const GatePtr one = gate();
  std::mutex mutex;
  std::string order;
  const auto enter = [&](Mode mode, char name) {
    return std::thread([&, mode, name] {
      const GateScope scope({{one, mode}});
      const std::lock_guard<std::mutex> lock(mutex);
      order += name;
    });
  };
  std::vector<std::thread> threads;
  {
    const GateScope scope({{one, Mode::kShared}});
    threads.push_back(enter(Mode::kExclusive, 'a'));
    until_waiting(one, 1);
    threads.push_back(enter(Mode::kShared, 'b'));  // not past the writer
    until_waiting(one, 2);
    threads.push_back(enter(Mode::kExclusive, 'c'));
    until_waiting(one, 3);
    threads.push_back(enter(Mode::kExclusive, 'd'));
    until_waiting(one, 4);
    const std::lock_guard<std::mutex> lock(mutex);
    EXPECT_EQ(order, "");
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(order, "abcd");
}

TEST(GateScope, DoesNotTakeWhatTheThreadHolds) {
  const GatePtr one = gate();
  {
    const GateScope outer({{one, Mode::kExclusive}});
    const GateScope middle({{one, Mode::kShared}});
    const GateScope inner({{one, Mode::kExclusive}});
  }
  // Left as often as taken: somebody else gets in.
  std::thread([&] { const GateScope scope({{one, Mode::kExclusive}}); }).join();
  EXPECT_EQ(GateScope::current(), nullptr);
}

TEST(GateScope, RefusesToWriteInsideAReader) {
  const GatePtr one = gate();
  const GatePtr other = gate();
  {
    const GateScope outer({{one, Mode::kShared}});
    const GateScope inner({{one, Mode::kShared}});
    EXPECT_THROW(GateScope({{other, Mode::kExclusive}, {one, Mode::kExclusive}}), std::logic_error);
    EXPECT_EQ(GateScope::current(), &inner);
  }
  std::thread([&] {
    const GateScope scope({{one, Mode::kExclusive}, {other, Mode::kExclusive}});
  }).join();
}

TEST(GateScope, TheStrongestOfTwoWishesCounts) {
  const GatePtr one = gate();
  const GateScope outer({{one, Mode::kShared}, {one, Mode::kExclusive}, {one, Mode::kShared}});
  const GateScope inner({{one, Mode::kExclusive}});
  EXPECT_EQ(GateScope::current(), &inner);
}

TEST(GateScope, AnyOrderOfManyGatesIsFine) {
  const std::vector<GatePtr> gates{gate(), gate(), gate()};
  int64_t count = 0;
  run(3, [&](int thread) {
    for (int i = 0; i < 1000; ++i) {
      std::vector<GateWish> wishes;
      for (int k = 0; k < 3; ++k) wishes.push_back({gates[(thread + k) % 3], Mode::kExclusive});
      const GateScope scope(std::move(wishes));
      ++count;
    }
  });
  EXPECT_EQ(count, 3000);
}

TEST(GateAdoption, AWorkerPassesTheGatesOfItsCaller) {
  const GatePtr one = gate();
  int value = 0;
  const GateScope scope({{one, Mode::kExclusive}});
  std::thread([&, callers = GateScope::current()] {
    const GateAdoption adoption(callers);
    const GateScope inner({{one, Mode::kExclusive}});
    value = 1;
  }).join();
  EXPECT_EQ(value, 1);
}

TEST(GateAdoption, EndsWithItsScope) {
  const GatePtr one = gate();
  std::atomic<bool> inside{false};
  std::thread worker;
  {
    const GateScope scope({{one, Mode::kExclusive}});
    worker = std::thread([&, callers = GateScope::current()] {
      {
        const GateAdoption adoption(callers);
      }
      const GateScope own({{one, Mode::kShared}});
      inside = true;
    });
    until_waiting(one, 1);
    EXPECT_FALSE(inside);
  }
  worker.join();
  EXPECT_TRUE(inside);
}

TEST(GateAdoption, OfNothingChangesNothing) {
  const GatePtr one = gate();
  const GateScope scope({{one, Mode::kShared}});
  const GateAdoption adoption(nullptr);
  EXPECT_EQ(GateScope::current(), &scope);
}

}  // namespace
}  // namespace neuron::subgraph
