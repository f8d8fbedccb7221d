#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <latch>
#include <optional>
#include <semaphore>
#include <thread>

#include "runtime/caller.h"
#include "runtime/scheduler.h"

namespace neuron::runtime {
namespace {

using Group = Scheduler::Group;

void any_core(int32_t) {}

TEST(BoundCaller, GoesRoundRobin) {
  Scheduler scheduler(3, any_core);
  Group group(scheduler, 0, 3);
  for (int32_t i = 0; i < 100; ++i) {
    const auto lease = scheduler.try_lease(group, true);
    ASSERT_TRUE(lease);
    ASSERT_EQ(lease->replica(), i % 3);
  }
}

TEST(BoundCaller, GoesRoundRobinAfterOthers) {
  Scheduler scheduler(3, any_core);
  Group group(scheduler, 0, 3);
  const auto lease_of = [&](int32_t replica) {
    const auto lease = scheduler.try_lease(group, true);
    ASSERT_TRUE(lease);
    ASSERT_EQ(lease->replica(), replica);
  };
  for (int i = 0; i < 50; ++i) {
    std::thread(lease_of, 0).join();
    lease_of(1);
    lease_of(2);
    lease_of(0);  // which another thread has only just given back
    std::thread([&] {
      lease_of(1);
      lease_of(2);
    }).join();
  }
}

int32_t replica_of(const std::optional<Scheduler::Lease>& lease) {
  return lease ? lease->replica() : -1;
}

/// A thread that leases a core for as long as told, and lives until the end of the block.
class OtherCaller {
 public:
  OtherCaller(Scheduler& scheduler, Group& group)
      : thread_([this, &scheduler, &group] {
          {
            const auto lease = scheduler.try_lease(group, true);
            replica_ = replica_of(lease);
            leased_.count_down();
            give_back_.acquire();
          }
          given_back_.count_down();
          end_.acquire();
        }) {
    leased_.wait();
  }
  ~OtherCaller() {
    give_back_.release();
    end_.release();
  }

  int32_t replica() const { return replica_; }

  void give_back() {
    give_back_.release();
    given_back_.wait();
  }

  void end() {
    end_.release();
    thread_.join();
  }

 private:
  int32_t replica_ = -1;
  std::latch leased_{1}, given_back_{1};
  std::counting_semaphore<2> give_back_{0}, end_{0};
  std::jthread thread_;
};

/// This thread leased core 0 last, `other_` core 1 at the same time, and it is the turn of core 1.
class BoundCallers : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(first_, 0);
    ASSERT_EQ(other_.replica(), 1);
    ASSERT_EQ(lease(), 0);
    other_.give_back();
  }
  int32_t lease(bool bound = true) { return replica_of(scheduler_.try_lease(group_, bound)); }

  Scheduler scheduler_{2, any_core};
  Group group_{scheduler_, 0, 2};
  const int32_t first_ = lease();
  OtherCaller other_{scheduler_, group_};
};

TEST_F(BoundCallers, LeaveTheNextCoreToAThreadThatComputedAtTheSameTime) {
  {
    const auto own = scheduler_.try_lease(group_, true);
    EXPECT_EQ(replica_of(own), 0);
    EXPECT_EQ(lease(), 1);  // its own is busy: no request waits while a core is free
  }
  // The other has not computed since: round robin.
  for (int32_t i = 0; i < 10; ++i) EXPECT_EQ(lease(), i % 2);
}

TEST_F(BoundCallers, LeaveNoCoreToAThreadThatHasEnded) {
  other_.end();
  EXPECT_EQ(lease(), 1);
}

TEST_F(BoundCallers, AreTheOnlyOnesThatLeaveTheRoundRobin) {
  EXPECT_EQ(lease(false), 1);
}

/// Calls what it was given at the end of its thread, after the data of threads made after it.
class AtThreadEnd {
 public:
  ~AtThreadEnd() {
    if (call) call();
  }
  std::function<void()> call;
};

TEST(BoundCaller, MayComputeWhenItsThreadIsSoFarAtItsEndThatItsDataAreGone) {
  Scheduler scheduler(2, any_core);
  Group group(scheduler, 0, 2);
  int32_t before = -1;
  int32_t at_end = -1;
  bool known_before = false;
  bool known_at_end = true;
  std::thread([&] {
    thread_local AtThreadEnd last;
    last.call = [&] {
      known_at_end = Caller::this_thread() != nullptr;
      at_end = replica_of(scheduler.try_lease(group, true));
    };
    known_before = Caller::this_thread() != nullptr;
    before = replica_of(scheduler.try_lease(group, true));
  }).join();
  EXPECT_TRUE(known_before);
  EXPECT_EQ(before, 0);
  EXPECT_FALSE(known_at_end);
  EXPECT_EQ(at_end, 1);
  EXPECT_EQ(replica_of(scheduler.try_lease(group, true)), 0);
}

}  // namespace
}  // namespace neuron::runtime
