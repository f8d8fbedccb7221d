// Memory that runs out at any moment: nothing half done is left, and the next try succeeds.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "stub_backend.h"
#include "subgraph/operations.h"

namespace {

/// How many allocations of this thread succeed before one fails; negative: all.
thread_local int64_t allocations_left = -1;
thread_local bool allocation_failed = false;

void* allocate(std::size_t size) {
  if (allocations_left == 0) {
    allocations_left = -1;  // the handling of the failure may allocate
    allocation_failed = true;
    throw std::bad_alloc();
  }
  if (allocations_left > 0) --allocations_left;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}

}  // namespace

// For the whole program, libtorch included.
void* operator new(std::size_t size) {
  return allocate(size);
}
void* operator new[](std::size_t size) {
  return allocate(size);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace neuron::subgraph {
namespace {

using Cores = std::vector<int64_t>;

class AllocationFailureTest : public testing::OnStubCores {
 protected:
  static SubgraphHandle replicated(int32_t count) {
    return NeuronSubgraph::from_file(testing::make_state({.placement = {0, count}}));
  }
  static bool runs(const SubgraphHandle& handle) {
    return at::equal(forward({at::full({2}, 3.0)}, handle)[0], at::full({2}, 3.0));
  }
};

/// Calls `step` with the first, second, ... allocation failing, until it needs no more of them.
/// `check` is called after each.
template <typename Step, typename Check>
int each_allocation_fails(const Step& step, const Check& check) {
  for (int n = 0;; ++n) {
    allocation_failed = false;
    allocations_left = n;
    try {
      step();
    } catch (const std::exception&) {
      EXPECT_TRUE(allocation_failed) << n;
    }
    allocations_left = -1;
    const bool failed = allocation_failed;
    check(n);
    if (!failed) return n;
  }
}

TEST_F(AllocationFailureTest, ALoadSurvivesTheFailureOfEachAllocation) {
  const auto state = testing::make_state({.placement = {0, 3}});
  SubgraphHandle handle;
  const int count = each_allocation_fails([&] { handle = NeuronSubgraph::from_file(state); },
                                          [&](int n) {
                                            handle.reset();
                                            ASSERT_EQ(stub_->alive(), 0) << n;
                                            for (const auto& core : core_stats())
                                              ASSERT_EQ(core.models, 0) << n;
                                          });
  EXPECT_GT(count, 20);
  EXPECT_TRUE(runs(replicated(3)));
}

TEST_F(AllocationFailureTest, AMoveSurvivesTheFailureOfEachAllocation) {
  const auto handle = replicated(1);
  Cores cores{0};
  const int count = each_allocation_fails(
      [&] {
        set_neuron_cores({handle}, 1, 2);
        cores = {1, 2};
      },
      [&](int n) {
        ASSERT_EQ(status({handle})[0].cores, cores) << n;
        // What computed last may still be letting go of the replicas that were replaced.
        while (stub_->alive() != static_cast<int>(cores.size())) std::this_thread::yield();
        ASSERT_TRUE(runs(handle)) << n;
      });
  EXPECT_GT(count, 5);
  EXPECT_EQ(cores, (Cores{1, 2}));
}

TEST_F(AllocationFailureTest, ABackgroundLoadThatCannotBeginLeavesTheModuleUnloaded) {
  const auto state = testing::make_state({.async_load = true});
  const int count = each_allocation_fails(
      [&] {
        const auto handle = NeuronSubgraph::from_file(state);
        allocations_left = -1;  // the load itself is another thread's
        EXPECT_TRUE(wait({handle}, std::nullopt));
      },
      [&](int n) {
        while (stub_->alive() != 0) std::this_thread::yield();
        for (const auto& core : core_stats()) ASSERT_EQ(core.models, 0) << n;
      });
  EXPECT_GT(count, 20);
}

TEST_F(AllocationFailureTest, AnInferenceSurvivesTheFailureOfEachAllocation) {
  const auto handle = replicated(2);
  const auto input = at::ones({2});
  each_allocation_fails([&] { forward({input}, handle); },
                        [&](int n) {
                          for (int i = 0; i < 2; ++i) ASSERT_TRUE(runs(handle)) << n;
                        });
  EXPECT_TRUE(runs(handle));
}

}  // namespace
}  // namespace neuron::subgraph
