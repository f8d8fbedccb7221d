// The public C++ API on modules that went through torch::jit::save and load, without Python.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <neuron_ext/placement.h>
#include <neuron_ext/runtime.h>
#include <torch/script.h>

#include <thread>

#include "traced_module.h"

namespace neuron {
namespace {

using testing::loaded;
using testing::saved;
using testing::traced;
using Cores = std::vector<int64_t>;

class ModuleTest : public testing::OnStubCores {
 protected:
  static Cores cores_of(const torch::jit::Module& module) { return status(module).at(0).cores; }
};

TEST_F(ModuleTest, SavesLoadsAndRuns) {
  auto module = loaded(saved(traced()));
  EXPECT_EQ(status(module).at(0).state, "loaded");
  const auto x = at::rand({2});
  EXPECT_TRUE(at::equal(module.forward({x}).toTensor(), x));
  EXPECT_EQ(status(module).at(0).executions, Cores{1});
}

TEST_F(ModuleTest, GuardsPlaceWhatIsLoadedOnTheirThread) {
  const std::string bytes = saved(traced());
  {
    const NeuronCoresGuard outer(2);
    EXPECT_EQ(cores_of(loaded(bytes)), Cores{2});
    {
      const MulticoreGuard inner;
      EXPECT_EQ(cores_of(loaded(bytes)), (Cores{0, 1, 2, 3}));
    }
    EXPECT_EQ(cores_of(loaded(bytes)), Cores{2});
    Cores elsewhere;
    std::thread([&] { elsewhere = cores_of(loaded(bytes)); }).join();
    EXPECT_EQ(elsewhere, Cores{0});
  }
  EXPECT_EQ(cores_of(loaded(bytes)), Cores{0});
  EXPECT_THROW(NeuronCoresGuard(4), std::invalid_argument);
  EXPECT_THROW(NeuronCoresGuard(3, 2), std::invalid_argument);
  EXPECT_EQ(cores_of(loaded(bytes)), Cores{0});
}

TEST_F(ModuleTest, FlagsAndPlacementAreSavedWithTheModule) {
  auto module = traced();
  lazy_load(module);
  async_load(module);
  set_neuron_cores(module, 1, 2);
  wait(module);
  const auto again = loaded(saved(module));
  const auto told = status(again).at(0);
  EXPECT_EQ(told.state, "unloaded");
  EXPECT_TRUE(told.lazy_load);
  EXPECT_TRUE(told.async_load);
  EXPECT_EQ(told.start_nc, 1);
  EXPECT_EQ(told.nc_count, 2);
  wait(again);
  EXPECT_EQ(cores_of(again), (Cores{1, 2}));
}

TEST_F(ModuleTest, MovesReplicatesAndUnloads) {
  auto module = loaded(saved(traced()));
  set_neuron_cores(module, 3);
  EXPECT_EQ(cores_of(module), Cores{3});
  set_multicore(module);
  EXPECT_EQ(cores_of(module), (Cores{0, 1, 2, 3}));
  EXPECT_EQ(core_stats().at(3).models, 1);
  unload(module);
  EXPECT_EQ(status(module).at(0).state, "unloaded");
  EXPECT_EQ(core_stats().at(3).models, 0);
  EXPECT_THROW(set_neuron_cores(module, 9), std::invalid_argument);
  EXPECT_EQ(visible_core_count(), 4);
}

TEST_F(ModuleTest, FindsSubgraphsInSubmodulesContainersAndDeepcopies) {
  torch::jit::Module outer("Outer");
  outer.register_module("first", traced());
  torch::jit::Module middle("Middle");
  middle.register_module("second", traced());
  outer.register_module("middle", middle);
  outer.register_module("again", outer.attr("first").toModule());
  EXPECT_EQ(status(outer).size(), 2U);
  set_neuron_cores(outer, 1);
  for (const auto& told : status(outer)) EXPECT_EQ(told.cores, Cores{1});
  const auto copy = outer.deepcopy();
  EXPECT_EQ(status(copy).size(), 2U);
  set_neuron_cores(outer, 3);
  EXPECT_EQ(cores_of(copy), Cores{1});
}

TEST_F(ModuleTest, AModuleWithoutSubgraphsIsLeftAlone) {
  torch::jit::Module plain("Plain");
  EXPECT_NO_THROW(set_neuron_cores(plain, 99, 99));
  EXPECT_NO_THROW(set_multicore(plain));
  EXPECT_NO_THROW(unload(plain));
  EXPECT_TRUE(wait(plain));
  EXPECT_TRUE(status(plain).empty());
}

TEST_F(ModuleTest, LoadsInManyThreadsAtOnce) {
  const std::string bytes = saved(traced());
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int32_t id = 0; id < 16; ++id) {
    threads.emplace_back([&, id] {
      for (int i = 0; i < 20; ++i) {
        const NeuronCoresGuard guard(id % 4);
        auto module = loaded(bytes);
        const auto x = at::full({2}, static_cast<float>(id));
        if (cores_of(module) != Cores{id % 4}) ++wrong;
        if (!at::equal(module.forward({x}).toTensor(), x)) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace neuron
