#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <semaphore>
#include <stdexcept>
#include <thread>

#include "stub_subgraphs.h"
#include "subgraph/operations.h"

namespace neuron::subgraph {
namespace {

using runtime::Runtime;
using runtime::TensorRefs;
using runtime::Tensors;
using namespace std::chrono_literals;

class MoveTest : public testing::OnStubSubgraphs {};

TEST_F(MoveTest, AFailedLoadCanBeMovedElsewhere) {
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

TEST_F(MoveTest, AMoveLoadsPublishesAndThenFrees) {
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

TEST_F(MoveTest, ASubgraphNamedTwiceMovesOnce) {
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

TEST_F(MoveTest, AFailedMoveLeavesTheModuleWhereItWas) {
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

TEST_F(MoveTest, AFailedBackgroundMoveIsToldOnceAndTheModuleRunsOn) {
  const auto handle = from_file({.async_load = true});
  wait({handle}, std::nullopt);
  stub_->on_load = [](int32_t) { throw std::runtime_error("core 3 is broken"); };
  set_neuron_cores({handle}, 3, 1);
  EXPECT_TRUE(contains(error_of([&] { run(handle); }), "core 3 is broken"));
  EXPECT_EQ(run(handle, 6), 6);
  EXPECT_EQ(cores_of(handle), Cores{0});
  EXPECT_EQ(status_of(handle).start_nc, -1);
}

TEST_F(MoveTest, ABackgroundMoveIsWaitedForByForward) {
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

TEST_F(MoveTest, RequestsGoOnDuringAMoveAndTheOldReplicaIsFreedAfterTheLast) {
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

TEST_F(MoveTest, UnloadFreesAndTheNextUseLoadsAgain) {
  const auto handle = from_file({.placement = {2, 2}});
  unload({handle});
  EXPECT_EQ(state_of(handle), "unloaded");
  EXPECT_EQ(stub_->alive(), 0);
  EXPECT_EQ(cores_of(handle), Cores{});
  EXPECT_EQ(run(handle, 4), 4);
  EXPECT_EQ(cores_of(handle), (Cores{2, 3}));
}

TEST_F(MoveTest, AModuleDroppedWhileItLoadsIsFreed) {
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
TEST_F(MoveTest, NothingOutlivesAModuleThatComputedOnACoresOwnThread) {
  for (int i = 0; i < 2000; ++i) {
    auto handle = from_file();
    const at::Tensor input = at::full({2}, static_cast<float>(i));
    EXPECT_EQ(forward({input}, handle)[0][0].item<float>(), static_cast<float>(i));
    ASSERT_EQ(input.use_count(), 1) << "after inference " << i;
    handle.reset();
    ASSERT_EQ(stub_->alive(), 0) << "after inference " << i;
  }
}

TEST_F(MoveTest, NothingOutlivesAModuleThatLoadedInTheBackground) {
  for (int i = 0; i < 2000; ++i) {
    auto handle = from_file({.async_load = true});
    wait({handle}, std::nullopt);
    handle.reset();
    ASSERT_EQ(stub_->alive(), 0) << "after load " << i;
  }
}

TEST_F(MoveTest, MovesReplicationsAndUnloadsLoseNoRequest) {
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
