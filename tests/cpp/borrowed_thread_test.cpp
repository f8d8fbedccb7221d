// Which thread computes an inference.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>
#include <vector>

#include "stub_backend.h"
#include "subgraph/operations.h"

namespace neuron::subgraph {
namespace {

using runtime::TensorRefs;
using runtime::Tensors;
using CoreNumbers = std::vector<int32_t>;

/// A subgraph on stub cores of one CPU each, which notes who computes.
class BorrowedThreadTest : public testing::OnStubCores {
 protected:
  void SetUp() override {
    OnStubCores::SetUp();
    stub_->may_borrow_thread = true;
    stub_->on_borrow = [this](int32_t core) { bound_to_.push_back(core); };
    stub_->on_execute = [this](int32_t core, TensorRefs inputs) {
      ran_on_.push_back(core);
      thread_ = std::this_thread::get_id();
      const auto end = CondVar::Clock::now() + duration_;
      while (CondVar::Clock::now() < end) {
      }
      return Tensors(inputs.begin(), inputs.end());
    };
  }

  SubgraphHandle replicated(int32_t first, int32_t count) {
    return NeuronSubgraph::from_file(testing::make_state({.placement = {first, count}}));
  }
  static void run(const SubgraphHandle& handle) { forward({at::zeros({2})}, handle); }
  bool ran_here() const { return thread_ == std::this_thread::get_id(); }

  CondVar::Clock::duration duration_{};
  CoreNumbers ran_on_;
  CoreNumbers bound_to_;
  std::thread::id thread_;
};

TEST_F(BorrowedThreadTest, LongInferencesRunOnTheCallersThreadBoundToTheCore) {
  duration_ = std::chrono::milliseconds(1);
  const auto handle = replicated(1, 2);
  for (int i = 0; i < 3; ++i) {
    run(handle);
    EXPECT_TRUE(ran_here());
  }
  EXPECT_EQ(ran_on_, (CoreNumbers{1, 2, 1}));
  EXPECT_EQ(bound_to_, ran_on_);
}

TEST_F(BorrowedThreadTest, BriefInferencesRunThereUnboundInTheSameOrder) {
  const auto handle = replicated(0, 4);
  size_t bound = 0;
  do {
    ASSERT_LT(ran_on_.size(), 1000U) << "none showed itself as brief";
    bound = bound_to_.size();
    run(handle);
    EXPECT_TRUE(ran_here());
  } while (bound_to_.size() > bound);
  for (size_t i = 0; i < ran_on_.size(); ++i) ASSERT_EQ(ran_on_[i], static_cast<int32_t>(i % 4));
}

TEST_F(BorrowedThreadTest, AnInferenceThatMayBeGivenUpRunsOnTheCoresThread) {
  runtime::Settings settings;
  settings.exec_timeout = std::chrono::seconds(600);
  runtime::Runtime::install_for_testing(std::make_unique<testing::StubBackend>(stub_, 4), settings);
  duration_ = std::chrono::milliseconds(1);
  const auto handle = replicated(0, 2);
  for (int i = 0; i < 3; ++i) {
    run(handle);
    EXPECT_FALSE(ran_here());
  }
  EXPECT_EQ(ran_on_, (CoreNumbers{0, 1, 0}));
  EXPECT_TRUE(bound_to_.empty());
}

TEST_F(BorrowedThreadTest, CoresOfSeveralCpusComputeOnTheirOwnThreads) {
  stub_->may_borrow_thread = false;
  const auto handle = replicated(0, 1);
  for (int i = 0; i < 3; ++i) {
    run(handle);
    EXPECT_FALSE(ran_here());
  }
}

}  // namespace
}  // namespace neuron::subgraph
