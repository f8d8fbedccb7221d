#include "subgraph/subgraph.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <barrier>
#include <future>
#include <latch>
#include <semaphore>
#include <stdexcept>
#include <thread>

#include "placement/context.h"
#include "stub_backend.h"
#include "subgraph/operations.h"

namespace neuron::subgraph {
namespace {

using runtime::Runtime;
using runtime::TensorRefs;
using runtime::Tensors;
using namespace std::chrono_literals;
using Cores = std::vector<int64_t>;

class SubgraphTest : public testing::OnStubCores {
 protected:
  static SubgraphHandle from_file(Wishes wishes = {}) {
    return NeuronSubgraph::from_file(testing::make_state(wishes));
  }
  static SubgraphHandle from_trace(Wishes wishes = {}) {
    return NeuronSubgraph::from_trace(testing::make_state(wishes));
  }
  static SubgraphStatus status_of(const SubgraphHandle& handle) { return status({handle})[0]; }
  static std::string state_of(const SubgraphHandle& handle) { return status_of(handle).state; }
  static Cores cores_of(const SubgraphHandle& handle) { return status_of(handle).cores; }
  static float run(const SubgraphHandle& handle, float value = 1) {
    return forward({at::full({2}, value)}, handle)[0][0].item<float>();
  }
  /// The text of the std::runtime_error that `call` throws.
  template <typename Call>
  static std::string error_of(Call call) {
    try {
      call();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "nothing thrown";
  }
  static bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  }
};

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

TEST_F(SubgraphTest, AFailedLoadCanBeMovedElsewhere) {
  stub_->on_load = [](int32_t core) {
    if (core == 0) throw std::runtime_error("core 0 is broken");
  };
  const auto handle = from_file({.async_load = true});
  EXPECT_TRUE(contains(error_of([&] { wait({handle}, std::nullopt); }), "core 0"));
  set_async_load({handle}, false);
  set_neuron_cores({handle}, 3, 1);
  EXPECT_EQ(state_of(handle), "loaded");
  EXPECT_EQ(cores_of(handle), Cores{3});
  EXPECT_EQ(run(handle, 4), 4);
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

TEST_F(SubgraphTest, AMoveLoadsPublishesAndThenFrees) {
  const auto handle = from_file();
  int alive_at_load = -1;
  stub_->on_load = [&](int32_t) { alive_at_load = stub_->alive(); };
  set_neuron_cores({handle}, 2, 2);
  EXPECT_EQ(alive_at_load, 2) << "the old replica and the first new one";
  EXPECT_EQ(cores_of(handle), (Cores{2, 3}));
  EXPECT_EQ(stub_->alive(), 2);
  std::vector<int32_t> ran_on;
  stub_->on_execute = [&](int32_t core, TensorRefs inputs) {
    ran_on.push_back(core);
    return Tensors(inputs.begin(), inputs.end());
  };
  for (int i = 0; i < 3; ++i) run(handle);
  EXPECT_EQ(ran_on, (std::vector<int32_t>{2, 3, 2}));
}

TEST_F(SubgraphTest, ASubgraphNamedTwiceMovesOnce) {
  const auto handle = from_file();
  set_neuron_cores({handle, handle}, 2, 1);
  EXPECT_EQ(cores_of(handle), Cores{2});
  EXPECT_EQ(stub_->loads, 2);
  set_async_load({handle}, true);
  set_neuron_cores({handle, handle}, 3, 1);
  EXPECT_TRUE(wait({handle, handle}, std::nullopt));
  EXPECT_EQ(cores_of(handle), Cores{3});
  EXPECT_EQ(stub_->loads, 3);
}

TEST_F(SubgraphTest, AFailedMoveLeavesTheModuleWhereItWas) {
  const auto one = from_file({.placement = {0, 1}});
  const auto other = from_file({.placement = {1, 1}});
  int loads = 0;
  stub_->on_load = [&](int32_t) {
    if (++loads == 2) throw std::runtime_error("out of memory");
  };
  const auto text = error_of([&] { set_neuron_cores({one, other}, 3, 1); });
  EXPECT_TRUE(contains(text, "out of memory")) << text;
  EXPECT_TRUE(contains(text, "still runs on cores ")) << text;
  EXPECT_EQ(cores_of(one), Cores{0});
  EXPECT_EQ(cores_of(other), Cores{1});
  EXPECT_EQ(status_of(one).start_nc, 0);
  EXPECT_EQ(state_of(one), "loaded");
  EXPECT_TRUE(contains(status_of(one).error + status_of(other).error, "out of memory"));
  EXPECT_EQ(run(one, 8), 8);
  EXPECT_EQ(run(other, 9), 9);
  EXPECT_EQ(core_stats()[3].models, 0);
}

TEST_F(SubgraphTest, AFailedBackgroundMoveIsToldOnceAndTheModuleRunsOn) {
  const auto handle = from_file({.async_load = true});
  wait({handle}, std::nullopt);
  stub_->on_load = [](int32_t) { throw std::runtime_error("core 3 is broken"); };
  set_neuron_cores({handle}, 3, 1);
  EXPECT_TRUE(contains(error_of([&] { run(handle); }), "core 3 is broken"));
  EXPECT_EQ(run(handle, 6), 6);
  EXPECT_EQ(cores_of(handle), Cores{0});
  EXPECT_EQ(status_of(handle).start_nc, -1);
}

TEST_F(SubgraphTest, ABackgroundMoveIsWaitedForByForward) {
  const auto handle = from_file({.async_load = true});
  wait({handle}, std::nullopt);
  std::binary_semaphore go_on(0);
  stub_->on_load = [&](int32_t) { go_on.acquire(); };
  set_neuron_cores({handle}, 3, 1);
  EXPECT_EQ(state_of(handle), "loading");
  auto result = std::async(std::launch::async, [&] { return run(handle, 5); });
  go_on.release();
  EXPECT_EQ(result.get(), 5);
  EXPECT_EQ(cores_of(handle), Cores{3});
  EXPECT_EQ(status_of(handle).executions, Cores{1});
}

TEST_F(SubgraphTest, RequestsGoOnDuringAMoveAndTheOldReplicaIsFreedAfterTheLast) {
  const auto handle = from_file();
  std::binary_semaphore in_flight(0);
  std::binary_semaphore finish(0);
  stub_->on_execute = [&](int32_t core, TensorRefs inputs) {
    if (core == 0) {
      in_flight.release();
      finish.acquire();
    }
    return Tensors(inputs.begin(), inputs.end());
  };
  auto slow = std::async(std::launch::async, [&] { return run(handle, 1); });
  in_flight.acquire();
  set_neuron_cores({handle}, 1, 1);
  EXPECT_EQ(stub_->alive(), 2) << "the request in flight holds the old replica";
  EXPECT_EQ(run(handle, 2), 2);
  finish.release();
  EXPECT_EQ(slow.get(), 1);
  EXPECT_EQ(Runtime::get().scheduler().close_until(CondVar::Clock::now() + 60s), true);
  while (stub_->alive() != 1) std::this_thread::yield();  // the core's thread drops it last
  EXPECT_EQ(cores_of(handle), Cores{1});
}

TEST_F(SubgraphTest, UnloadFreesAndTheNextUseLoadsAgain) {
  const auto handle = from_file({.placement = {2, 2}});
  unload({handle});
  EXPECT_EQ(state_of(handle), "unloaded");
  EXPECT_EQ(stub_->alive(), 0);
  EXPECT_EQ(cores_of(handle), Cores{});
  EXPECT_EQ(run(handle, 4), 4);
  EXPECT_EQ(cores_of(handle), (Cores{2, 3}));
}

TEST_F(SubgraphTest, AModuleDroppedWhileItLoadsIsFreed) {
  std::binary_semaphore loading(0);
  std::binary_semaphore go_on(0);
  stub_->on_load = [&](int32_t) {
    loading.release();
    go_on.acquire();
  };
  auto handle = from_file({.async_load = true});
  loading.acquire();
  handle.reset();
  go_on.release();
  while (stub_->loads != 1 || stub_->alive() != 0) std::this_thread::yield();
}

// Threads of the library that have just told of a result drop what they hold a moment later. That
// moment is short, hence the repetitions.
TEST_F(SubgraphTest, NothingOutlivesAModuleThatComputedOnACoresOwnThread) {
  for (int i = 0; i < 2000; ++i) {
    auto handle = from_file();
    const at::Tensor input = at::full({2}, static_cast<float>(i));
    EXPECT_EQ(forward({input}, handle)[0][0].item<float>(), static_cast<float>(i));
    ASSERT_EQ(input.use_count(), 1) << "after inference " << i;
    handle.reset();
    ASSERT_EQ(stub_->alive(), 0) << "after inference " << i;
  }
}

TEST_F(SubgraphTest, NothingOutlivesAModuleThatLoadedInTheBackground) {
  for (int i = 0; i < 2000; ++i) {
    auto handle = from_file({.async_load = true});
    wait({handle}, std::nullopt);
    handle.reset();
    ASSERT_EQ(stub_->alive(), 0) << "after load " << i;
  }
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

TEST_F(SubgraphTest, MovesReplicationsAndUnloadsLoseNoRequest) {
  const auto handle = from_file();
  stub_->on_execute = [](int32_t, TensorRefs inputs) { return Tensors{inputs[0] * 2}; };
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int id = 0; id < 8; ++id) {
    callers.emplace_back([&, id] {
      for (int i = 0; i < 300; ++i) {
        const auto value = static_cast<float>(id * 1000 + i);
        if (run(handle, value) != 2 * value) ++wrong;
      }
    });
  }
  std::thread mover([&] {
    for (int64_t i = 0; !stop; ++i) {
      set_neuron_cores({handle}, i % 4, 1);
      set_multicore({handle});
      unload({handle});
    }
  });
  for (auto& caller : callers) caller.join();
  stop = true;
  mover.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace neuron::subgraph
