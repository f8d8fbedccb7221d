#include "subgraph/subgraph.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <future>
#include <semaphore>
#include <stdexcept>

#include "placement/context.h"
#include "stub_subgraphs.h"
#include "subgraph/operations.h"

namespace neuron::subgraph {
namespace {

using runtime::TensorRefs;
using runtime::Tensors;

class SubgraphTest : public testing::OnStubSubgraphs {};

TEST_F(SubgraphTest, LoadsWhenItsStateIsSetAndNotBefore) {
  const auto traced = from_trace();
  EXPECT_EQ(state_of(traced), "unloaded");
  EXPECT_EQ(stub_->loads, 0);
  const auto loaded = from_file();
  EXPECT_EQ(state_of(loaded), "loaded");
  EXPECT_EQ(cores_of(loaded), Cores{0});
  run(traced);
  EXPECT_EQ(cores_of(traced), Cores{1});
}

TEST_F(SubgraphTest, SuccessiveLoadsTakeTheLeastUsedCores) {
  std::vector<SubgraphHandle> all;
  for (int64_t i = 0; i < 6; ++i) {
    all.push_back(from_file());
    EXPECT_EQ(cores_of(all.back()), Cores{i % 4});
  }
  all[2].reset();  // core 2 is free again
  EXPECT_EQ(cores_of(from_file()), Cores{2});
  EXPECT_EQ(cores_of(from_file({.placement = {-1, 2}})), (Cores{2, 3}));
}

TEST_F(SubgraphTest, LazyLoadsAtFirstForward) {
  const auto lazy = from_file({.lazy_load = true});
  EXPECT_EQ(stub_->loads, 0);
  EXPECT_EQ(run(lazy, 7), 7);
  EXPECT_EQ(stub_->loads, 1);
  run(lazy);
  EXPECT_EQ(stub_->loads, 1);
}

TEST_F(SubgraphTest, TheContextOfItsMakingOutlivesTheContext) {
  const int64_t token = enter_placement_context({2, 2});
  const auto lazy = from_file({.lazy_load = true, .placement = {1, 1}});
  exit_placement_context(token);
  run(lazy);
  EXPECT_EQ(cores_of(lazy), (Cores{2, 3}));
  EXPECT_EQ(std::get<1>(lazy->state()).at("start_nc"), 1) << "a context is not saved";
  EXPECT_EQ(std::get<1>(lazy->state()).at("nc_count"), 1);
}

TEST_F(SubgraphTest, TwoBackgroundLoadsOverlap) {
  std::barrier together(2);  // passes only if both loads are under way at once
  stub_->on_load = [&](int32_t) { together.arrive_and_wait(); };
  const auto one = from_file({.async_load = true});
  const auto other = from_file({.async_load = true});
  EXPECT_TRUE(wait({one, other}, std::nullopt));
  EXPECT_EQ(stub_->loads, 2);
  EXPECT_EQ(cores_of(one), Cores{0});
  EXPECT_EQ(cores_of(other), Cores{1});
}

TEST_F(SubgraphTest, ForwardWaitsForABackgroundLoad) {
  std::binary_semaphore go_on(0);
  stub_->on_load = [&](int32_t) { go_on.acquire(); };
  const auto handle = from_file({.async_load = true});
  EXPECT_EQ(state_of(handle), "loading");
  auto result = std::async(std::launch::async, [&] { return run(handle, 5); });
  EXPECT_FALSE(wait({handle}, 0.01)) << "the load cannot have ended";
  EXPECT_EQ(stub_->loads, 0);
  go_on.release();
  EXPECT_EQ(result.get(), 5);
  EXPECT_EQ(state_of(handle), "loaded");
}

TEST_F(SubgraphTest, LazyAndAsyncTogetherLoadInTheBackgroundOnWait) {
  std::binary_semaphore go_on(0);
  stub_->on_load = [&](int32_t) { go_on.acquire(); };
  const auto handle = from_file({.lazy_load = true, .async_load = true});
  EXPECT_EQ(state_of(handle), "unloaded");
  EXPECT_FALSE(wait({handle}, 0.0));
  EXPECT_EQ(state_of(handle), "loading");
  go_on.release();
  EXPECT_TRUE(wait({handle}, std::nullopt));
  EXPECT_EQ(state_of(handle), "loaded");
}

TEST_F(SubgraphTest, AFailedBackgroundLoadIsToldOnceByForwardAndThenTriedAgain) {
  stub_->on_load = [](int32_t) { throw std::runtime_error("the moon is in the way"); };
  const auto handle = from_file({.async_load = true});
  EXPECT_TRUE(contains(error_of([&] { wait({handle}, std::nullopt); }), "the moon"));
  EXPECT_EQ(state_of(handle), "failed");
  EXPECT_TRUE(contains(status_of(handle).error, "the moon"));
  EXPECT_TRUE(contains(error_of([&] { run(handle); }), "the moon")) << "tried again, failed again";
  stub_->on_load = [](int32_t) {};
  EXPECT_EQ(run(handle, 3), 3);
  EXPECT_EQ(state_of(handle), "loaded");
  EXPECT_EQ(status_of(handle).error, "");
}

TEST_F(SubgraphTest, ForwardIsTheFirstToTellOfAFailedBackgroundLoad) {
  std::atomic<int> attempts{0};
  stub_->on_load = [&](int32_t) {
    if (++attempts == 1) throw std::runtime_error("first attempt");
  };
  const auto handle = from_file({.async_load = true});
  EXPECT_TRUE(contains(error_of([&] { run(handle); }), "first attempt"));
  EXPECT_EQ(attempts, 1) << "told, not tried again, by the forward that tells";
  EXPECT_EQ(run(handle, 2), 2);
  EXPECT_EQ(attempts, 2);
}

TEST_F(SubgraphTest, ASynchronousLoadThatFailsThrowsWhereItWasTriggered) {
  stub_->on_load = [](int32_t) { throw std::runtime_error("no room"); };
  EXPECT_TRUE(contains(error_of([] { from_file(); }), "no room"));
}

TEST_F(SubgraphTest, ALoadThatFailsOnTheThirdCoreFreesTheFirstTwo) {
  stub_->on_load = [](int32_t core) {
    if (core == 2) throw std::runtime_error("core 2 is broken");
  };
  EXPECT_TRUE(contains(error_of([] { from_file({.placement = {0, 4}}); }), "core 2"));
  EXPECT_EQ(stub_->loads, 2);
  EXPECT_EQ(stub_->frees, 2);
  for (const auto& core : core_stats()) EXPECT_EQ(core.models, 0) << core.index;
}

TEST_F(SubgraphTest, WrongInputsAreNamedBeforeAnythingRuns) {
  const auto handle = from_file();
  stub_->on_execute = [](int32_t, TensorRefs inputs) {
    ADD_FAILURE() << "ran";
    return Tensors(inputs.begin(), inputs.end());
  };
  const auto refusal = [&](std::vector<at::Tensor> inputs) -> std::string {
    try {
      forward(inputs, handle);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_TRUE(contains(refusal({}), "takes 1 input tensors (x), got 0"));
  EXPECT_TRUE(contains(refusal({at::zeros({2}), at::zeros({2})}), "got 2"));
  EXPECT_TRUE(
      contains(refusal({at::zeros({3})}), "shape [2] on cpu, got a float32 tensor of shape [3]"));
  EXPECT_TRUE(contains(refusal({at::zeros({2, 1})}), "got a float32 tensor of shape [2, 1]"));
  EXPECT_TRUE(contains(refusal({at::zeros({2}, at::kDouble)}), "got a float64 tensor"));
  EXPECT_TRUE(contains(refusal({at::zeros({2}, at::kMeta)}), "on meta"));
  EXPECT_TRUE(contains(refusal({at::Tensor()}), "input 'x' of subgraph 'stub'"));
  EXPECT_TRUE(contains(refusal({at::Tensor()}), "got None"));
  EXPECT_TRUE(contains(refusal({at::zeros({2}).to_sparse()}), "layout"));
}

TEST_F(SubgraphTest, NonContiguousInputsArriveDense) {
  const auto handle = from_file();
  stub_->on_execute = [](int32_t, TensorRefs inputs) {
    EXPECT_TRUE(inputs[0].is_contiguous());
    return Tensors(inputs.begin(), inputs.end());
  };
  const auto strided = at::arange(4, at::kFloat).slice(0, 0, 4, 2);
  EXPECT_TRUE(at::equal(forward({strided}, handle)[0], strided));
}

TEST_F(SubgraphTest, AnInferenceThatThrowsFailsItsCallerOnly) {
  const auto handle = from_file();
  stub_->on_execute = [](int32_t, TensorRefs inputs) -> Tensors {
    if (inputs[0][0].item<float>() < 0) throw std::runtime_error("negative");
    return Tensors(inputs.begin(), inputs.end());
  };
  EXPECT_EQ(error_of([&] { run(handle, -1); }), "negative");
  EXPECT_EQ(run(handle, 1), 1);
}

}  // namespace
}  // namespace neuron::subgraph
