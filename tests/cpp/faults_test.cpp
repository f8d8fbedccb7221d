// Cores and loads that fail: what callers see, and what is left.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <semaphore>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "stub_backend.h"
#include "subgraph/operations.h"

namespace neuron::subgraph {
namespace {

using runtime::TensorRefs;
using runtime::Tensors;
using Cores = std::vector<int64_t>;

class FaultsTest : public testing::OnStubCores {
 protected:
  void SetUp() override {
    OnStubCores::SetUp();
    stub_->on_execute = [this](int32_t core, TensorRefs inputs) -> Tensors {
      const float value = inputs[0][0].item<float>();
      if (value < 0) throw std::runtime_error("negative");
      if (core == broken_) throw std::runtime_error("core is broken");
      return {inputs[0] + 1};
    };
  }

  static SubgraphHandle replicated(int32_t count) {
    return NeuronSubgraph::from_file(testing::make_state({.placement = {0, count}}));
  }
  static float run(const SubgraphHandle& handle, float value) {
    return forward({at::full({2}, value)}, handle)[0][1].item<float>();
  }
  static std::string outcome(const SubgraphHandle& handle, float value) {
    try {
      return run(handle, value) == value + 1 ? "right" : "wrong";
    } catch (const std::runtime_error& error) {
      return error.what();
    }
  }
  static Cores quarantined(const SubgraphHandle& handle) { return status({handle})[0].quarantined; }

  std::atomic<int32_t> broken_{-1};
};

TEST_F(FaultsTest, ACoreThatFailsIsTakenOutAndComesBackWhenItWorks) {
  const auto handle = replicated(4);
  broken_ = 2;
  std::vector<std::string> outcomes;
  for (int i = 0; i < 40; ++i) outcomes.push_back(outcome(handle, static_cast<float>(i)));
  // Two failures are told; what it would have failed at next, another core did.
  EXPECT_EQ(std::ranges::count(outcomes, "core is broken"), 2);
  EXPECT_EQ(std::ranges::count(outcomes, "right"), 38);
  EXPECT_EQ(quarantined(handle), Cores{2});
  for (const auto& core : core_stats()) EXPECT_EQ(core.quarantined, core.index == 2);

  broken_ = -1;
  const int64_t before = status({handle})[0].executions[2];
  while (status({handle})[0].executions[2] == before) ASSERT_EQ(outcome(handle, 5), "right");
  EXPECT_EQ(quarantined(handle), Cores{});
  for (const auto& core : core_stats()) EXPECT_FALSE(core.quarantined);
}

TEST_F(FaultsTest, OneThatStillFailsWhenItIsTriedAgainCostsNoRequest) {
  const auto handle = replicated(2);
  broken_ = 0;
  for (int i = 0; i < 10; ++i) outcome(handle, 0);
  ASSERT_EQ(quarantined(handle), Cores{0});
  const std::string reference = "right";
  int trials = 0;
  stub_->on_execute = [&trials](int32_t core, TensorRefs inputs) -> Tensors {
    if (core == 0) {
      ++trials;
      throw std::runtime_error("core is broken");
    }
    return {inputs[0] + 1};
  };
  while (trials == 0) ASSERT_EQ(outcome(handle, 1), reference);
  EXPECT_EQ(quarantined(handle), Cores{0});
}

TEST_F(FaultsTest, RequestsThatFailOnEveryCoreTakeNoneOut) {
  const auto handle = replicated(4);
  for (int i = 0; i < 100; ++i) {
    ASSERT_EQ(outcome(handle, -1), "negative");
    ASSERT_EQ(quarantined(handle), Cores{});
  }
  // Also between good ones.
  for (int i = 0; i < 100; ++i) {
    ASSERT_EQ(outcome(handle, i % 3 == 0 ? 1 : -1), i % 3 == 0 ? "right" : "negative");
  }
  EXPECT_EQ(quarantined(handle), Cores{});
}

TEST_F(FaultsTest, ACoreThatFailsNowAndThenFailsThoseRequestsOnly) {
  const auto handle = replicated(2);
  int calls = 0;
  stub_->on_execute = [&calls](int32_t, TensorRefs inputs) -> Tensors {
    if (++calls % 5 == 0) throw std::runtime_error("now and then");
    return {inputs[0] + 1};
  };
  for (int i = 1; i <= 100; ++i) {
    ASSERT_EQ(outcome(handle, 1), i % 5 == 0 ? "now and then" : "right") << i;
  }
  EXPECT_EQ(quarantined(handle), Cores{});
}

TEST_F(FaultsTest, ASingleReplicaIsNeverTakenOut) {
  const auto handle = replicated(1);
  broken_ = 0;
  for (int i = 0; i < 10; ++i) ASSERT_EQ(outcome(handle, 1), "core is broken");
  broken_ = -1;
  EXPECT_EQ(outcome(handle, 1), "right");
}

TEST_F(FaultsTest, WhatChangesItsInputsIsNotTriedElsewhere) {
  auto state = testing::make_state({.placement = {0, 2}}, /*mutated_inputs=*/{0});
  const auto handle = NeuronSubgraph::from_file(state);
  broken_ = 0;
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(outcome(handle, 1), i % 2 == 0 ? "core is broken" : "right") << i;
  }
  EXPECT_EQ(quarantined(handle), Cores{});
}

TEST_F(FaultsTest, ChunksOfABatchGoElsewhereToo) {
  const auto handle = replicated(4);
  set_dynamic_batch({handle}, true);
  broken_ = 1;
  const auto rows = at::arange(64, at::kFloat);
  int failed = 0;
  for (int i = 0; i < 20; ++i) {
    try {
      ASSERT_TRUE(at::equal(forward({rows}, handle)[0], rows + 1)) << i;
    } catch (const std::runtime_error& error) {
      ASSERT_NE(std::string(error.what()).find("core is broken"), std::string::npos);
      ++failed;
    }
  }
  EXPECT_GE(failed, 1);
  EXPECT_LE(failed, 2);
  EXPECT_EQ(quarantined(handle), Cores{1});
}

TEST_F(FaultsTest, ManyCallersGetTheirOwnWhileACoreFails) {
  const auto handle = replicated(4);
  broken_ = 3;
  std::atomic<int> wrong{0};
  std::atomic<int> failed{0};
  std::vector<std::thread> callers;
  for (int id = 0; id < 8; ++id) {
    callers.emplace_back([&, id] {
      for (int i = 0; i < 500; ++i) {
        const auto value = static_cast<float>(1000 * id + i);
        const std::string result = outcome(handle, value);
        if (result == "core is broken") {
          ++failed;
        } else if (result != "right") {
          ++wrong;
        }
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_LE(failed, 2);
  EXPECT_EQ(quarantined(handle), Cores{3});
}

TEST_F(FaultsTest, AfterAMoveAllReplicasStartAfresh) {
  const auto handle = replicated(2);
  broken_ = 0;
  for (int i = 0; i < 10; ++i) outcome(handle, 0);
  ASSERT_EQ(quarantined(handle), Cores{0});
  broken_ = -1;
  set_multicore({handle});
  EXPECT_EQ(quarantined(handle), Cores{});
  for (int i = 0; i < 8; ++i) EXPECT_EQ(outcome(handle, 1), "right");
  EXPECT_EQ(status({handle})[0].executions, (Cores{2, 2, 2, 2}));
}

TEST_F(FaultsTest, ACoreThatDoesNotAnswerIsShownUntilItComesBack) {
  runtime::Runtime::uninstall_for_testing();
  runtime::Settings settings;
  settings.exec_timeout = std::chrono::seconds(1);
  runtime::Runtime::install_for_testing(std::make_unique<testing::StubBackend>(stub_, 4), settings);
  std::atomic<bool> stuck{true};
  stub_->on_execute = [&stuck](int32_t core, TensorRefs inputs) -> Tensors {
    while (core == 0 && stuck) std::this_thread::yield();
    return {inputs[0] + 1};
  };
  const auto handle = replicated(2);
  EXPECT_NE(outcome(handle, 1).find("NEURON_RT_EXEC_TIMEOUT"), std::string::npos);
  EXPECT_EQ(quarantined(handle), Cores{0});
  EXPECT_TRUE(core_stats()[0].quarantined);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(outcome(handle, 1), "right");
  stuck = false;
  while (core_stats()[0].quarantined) std::this_thread::yield();
  EXPECT_EQ(quarantined(handle), Cores{});
}

/// What is done to a module while its background load is about to fail.
class LoadAboutToFail : public FaultsTest {
 protected:
  void SetUp() override {
    FaultsTest::SetUp();
    stub_->on_load = [this](int32_t) {
      if (attempts_++ > 0) return;
      loading_.release();
      fail_.acquire();
      throw std::runtime_error("the load failed");
    };
    handle_ = NeuronSubgraph::from_file(testing::make_state({.async_load = true}));
    loading_.acquire();
  }
  void TearDown() override {
    handle_.reset();
    FaultsTest::TearDown();
  }

  SubgraphHandle handle_;
  std::atomic<int> attempts_{0};
  std::binary_semaphore loading_{0};
  std::binary_semaphore fail_{0};
};

TEST_F(LoadAboutToFail, AllWhoWaitAreTold) {
  std::vector<std::future<std::string>> waiting;
  for (int i = 0; i < 4; ++i) {
    waiting.push_back(std::async(std::launch::async, [&]() -> std::string {
      try {
        wait({handle_}, std::nullopt);
      } catch (const std::runtime_error& error) {
        return error.what();
      }
      return "nothing thrown";
    }));
  }
  fail_.release();
  for (auto& text : waiting) EXPECT_NE(text.get().find("the load failed"), std::string::npos);
  EXPECT_EQ(status({handle_})[0].state, "failed");
  EXPECT_EQ(outcome(handle_, 1), "right") << "tried again";
}

TEST_F(LoadAboutToFail, AMoveThatCameMeanwhileCounts) {
  auto moving = std::async(std::launch::async, [&] { set_neuron_cores({handle_}, 2, 2); });
  fail_.release();
  moving.get();
  EXPECT_TRUE(wait({handle_}, std::nullopt));
  EXPECT_EQ(status({handle_})[0].cores, (Cores{2, 3}));
  EXPECT_EQ(outcome(handle_, 1), "right");
}

TEST_F(LoadAboutToFail, WhatIsSavedMeanwhileIsWhole) {
  const State state = handle_->state();
  fail_.release();
  const auto again = NeuronSubgraph::from_trace(state);
  EXPECT_TRUE(status({again})[0].async_load);
  EXPECT_EQ(outcome(again, 1), "right");
  EXPECT_NE(outcome(handle_, 1).find("the load failed"), std::string::npos);
}

TEST_F(LoadAboutToFail, OneThatIsDroppedLeavesNothing) {
  handle_.reset();
  fail_.release();
  const auto loaded = [] {
    int64_t models = 0;
    for (const auto& core : core_stats()) models += core.models;
    return models;
  };
  while (loaded() != 0) std::this_thread::yield();
  EXPECT_EQ(stub_->loads, 0);
}

}  // namespace
}  // namespace neuron::subgraph
