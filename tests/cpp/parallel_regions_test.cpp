#include "runtime/host/parallel_regions.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <array>
#include <cstdint>

namespace neuron::runtime::host {
namespace {

using Region = void (*)(int64_t, int64_t*, int64_t*, int64_t*);

struct Result {
  int64_t threads = 0;
  int64_t level = -1;
  int64_t sum = 0;
};

constexpr int64_t kCount = 1001;
constexpr int64_t kSum = kCount * (kCount - 1) / 2;

class ParallelRegions : public ::testing::Test {
 protected:
  void SetUp() override {
    library_ = ::dlopen(NEURON_PARALLEL_REGIONS_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    ASSERT_NE(library_, nullptr) << ::dlerror();
    region_ = reinterpret_cast<Region>(::dlsym(library_, "region"));
    ASSERT_NE(region_, nullptr);
    serve_parallel_regions(library_);
  }

  Result run() const {
    Result result;
    region_(kCount, &result.threads, &result.level, &result.sum);
    return result;
  }

  void* library_ = nullptr;
  Region region_ = nullptr;
};

TEST_F(ParallelRegions, ATeamOfOneIsNotSetUp) {
  omp_set_num_threads(1);
  const Result result = run();
  EXPECT_EQ(result.threads, 1);
  EXPECT_EQ(result.level, 0) << "a region of libgomp's would be at level 1";
  EXPECT_EQ(result.sum, kSum);
}

TEST_F(ParallelRegions, MoreThreadsAreATeam) {
  omp_set_num_threads(3);
  const Result result = run();
  EXPECT_EQ(result.threads, 3);
  EXPECT_EQ(result.level, 1);
  EXPECT_EQ(result.sum, kSum);
}

TEST_F(ParallelRegions, InsideARegionOfTheCallersEachCallHasATeamOfItsOwn) {
  std::array<Result, 4> results;
#pragma omp parallel num_threads(4)
  {
    omp_set_num_threads(1);
    results[omp_get_thread_num()] = run();
  }
  for (const Result& result : results) {
    EXPECT_EQ(result.threads, 1);
    EXPECT_EQ(result.sum, kSum);
  }
}

}  // namespace
}  // namespace neuron::runtime::host
