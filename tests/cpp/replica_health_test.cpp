#include "runtime/replica_health.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <semaphore>
#include <string>
#include <vector>

namespace neuron::runtime {
namespace {

using namespace std::chrono_literals;
using Clock = ReplicaHealth::Clock;

class ReplicaHealthTest : public ::testing::Test {
 protected:
  /// The replicas that the next inferences go to.
  std::vector<int32_t> next(int count) {
    std::vector<int32_t> replicas;
    for (int i = 0; i < count; ++i) replicas.push_back(scheduler_.try_lease(group_)->replica());
    return replicas;
  }

  void fail_until_suspected(int32_t replica) {
    for (int i = 1; i < ReplicaHealth::kSuspicious; ++i) {
      ASSERT_FALSE(health_.suspect_after_failure(replica)) << i;
    }
    ASSERT_TRUE(health_.suspect_after_failure(replica));
  }

  const Clock::time_point start_ = Clock::now();
  Scheduler scheduler_{3, [](int32_t) {}};
  Scheduler::Group group_{scheduler_, 0, 3};
  ReplicaHealth health_{scheduler_, group_, {"a", "b", "c"}};
};

TEST_F(ReplicaHealthTest, OneThatFailsInARowIsTakenOut) {
  fail_until_suspected(1);
  EXPECT_EQ(next(4), (std::vector<int32_t>{0, 2, 0, 2}));
  EXPECT_TRUE(scheduler_.quarantined(group_, 1));
  EXPECT_FALSE(scheduler_.quarantined(group_, 0));
  EXPECT_TRUE(scheduler_.counts(1).quarantined);
  EXPECT_FALSE(scheduler_.counts(2).quarantined);
  health_.convict(1, "broken", start_);
  EXPECT_EQ(next(4), (std::vector<int32_t>{0, 2, 0, 2}));
}

TEST_F(ReplicaHealthTest, ASuccessBetweenClearsIt) {
  for (int i = 0; i < 10; ++i) {
    ASSERT_FALSE(health_.suspect_after_failure(1));
    ASSERT_FALSE(health_.suspect_after_failure(1));
    health_.note_success(1);
  }
  EXPECT_EQ(next(3), (std::vector<int32_t>{0, 1, 2}));
}

TEST_F(ReplicaHealthTest, WhereTheFaultWasTheRequestsItIsPutBack) {
  fail_until_suspected(1);
  health_.acquit(1);
  EXPECT_EQ(next(3), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_FALSE(scheduler_.counts(1).quarantined);
  // And its failures are forgotten.
  EXPECT_FALSE(health_.suspect_after_failure(1));
}

TEST_F(ReplicaHealthTest, TriesAgainAfterPausesThatDouble) {
  fail_until_suspected(1);
  health_.convict(1, "broken", start_);
  health_.put_back_due(start_ + 999ms);
  EXPECT_EQ(next(2), (std::vector<int32_t>{0, 2}));
  health_.put_back_due(start_ + 1s);
  EXPECT_EQ(next(3), (std::vector<int32_t>{0, 1, 2}));
  // One more failure is enough now.
  auto now = start_ + 1s;
  for (const auto pause : {2s, 4s, 8s, 16s, 32s, 60s, 60s}) {
    ASSERT_TRUE(health_.suspect_after_failure(1));
    health_.convict(1, "broken", now);
    health_.put_back_due(now + pause - 1ms);
    ASSERT_TRUE(scheduler_.quarantined(group_, 1)) << pause.count();
    now += pause;
    health_.put_back_due(now);
    ASSERT_FALSE(scheduler_.quarantined(group_, 1)) << pause.count();
  }
  // Acquitted of one failure it stays under suspicion; a success ends all that.
  ASSERT_TRUE(health_.suspect_after_failure(1));
  health_.acquit(1);
  ASSERT_TRUE(health_.suspect_after_failure(1));
  health_.acquit(1);
  health_.note_success(1);
  fail_until_suspected(1);
  health_.convict(1, "broken", now);
  health_.put_back_due(now + 1s);
  EXPECT_FALSE(scheduler_.quarantined(group_, 1));
}

TEST_F(ReplicaHealthTest, TheLastReplicaStays) {
  for (const int32_t replica : {0, 2}) {
    fail_until_suspected(replica);
    health_.convict(replica, "broken", start_);
  }
  for (int i = 0; i < 10; ++i) ASSERT_FALSE(health_.suspect_after_failure(1));
  EXPECT_EQ(next(2), (std::vector<int32_t>{1, 1}));
}

TEST_F(ReplicaHealthTest, SeveralSuspicionsAtOnceEndInOneVerdict) {
  fail_until_suspected(1);
  ASSERT_TRUE(health_.suspect_after_failure(1));
  ASSERT_TRUE(health_.suspect_after_failure(1));
  health_.acquit(1);
  EXPECT_TRUE(scheduler_.quarantined(group_, 1)) << "others are still judging";
  health_.convict(1, "broken", start_);
  health_.acquit(1);
  health_.note_success(1);  // of an inference that began before
  EXPECT_TRUE(scheduler_.quarantined(group_, 1));
}

TEST_F(ReplicaHealthTest, RatherOneThatFailsThanNone) {
  fail_until_suspected(1);
  health_.convict(1, "broken", start_);
  std::counting_semaphore<> come_back(0);
  class Stuck : public Job {
   public:
    explicit Stuck(std::counting_semaphore<>& until) : until_(until) {}
    void run(int32_t) noexcept override { until_.acquire(); }

   private:
    std::counting_semaphore<>& until_;
  };
  for (int i = 0; i < 2; ++i) {
    EXPECT_THROW(scheduler_.run(group_, std::make_shared<Stuck>(come_back), 20ms),
                 std::runtime_error);
  }
  EXPECT_EQ(next(2), (std::vector<int32_t>{1, 1}));
  EXPECT_TRUE(scheduler_.counts(0).quarantined);
  come_back.release(2);
  while (scheduler_.busy() != 0) std::this_thread::yield();
  EXPECT_FALSE(scheduler_.counts(0).quarantined);
}

TEST_F(ReplicaHealthTest, OneThatIsPutBackTakesWhatWaits) {
  fail_until_suspected(1);
  class Waiting : public Job {
   public:
    void run(int32_t replica) noexcept override { replica_ = replica; }
    int32_t replica_ = -1;
  };
  std::vector<Scheduler::Lease> held;
  for (int i = 0; i < 2; ++i) held.push_back(*scheduler_.try_lease(group_));
  const auto job = std::make_shared<Waiting>();
  scheduler_.start(group_, job);
  EXPECT_EQ(scheduler_.queued(), 1);
  health_.acquit(1);
  scheduler_.await(*job, {});
  EXPECT_EQ(job->replica_, 1);
  EXPECT_EQ(scheduler_.queued(), 0);
}

}  // namespace
}  // namespace neuron::runtime
