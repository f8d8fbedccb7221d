// neuron::data_parallel on stub cores: which core computes what, and what is loaded when.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <neuron_ext/data_parallel.h>
#include <neuron_ext/runtime.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <latch>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

#include "parallel/chunk_times.h"
#include "traced_module.h"

namespace neuron {
namespace {

using runtime::TensorRefs;
using runtime::Tensors;
using testing::loaded;
using testing::saved;
using testing::traced;
using Cores = std::vector<int64_t>;

/// The module traced takes two rows and gives them doubled.
class DataParallelTest : public testing::OnStubCores {
 protected:
  void SetUp() override {
    OnStubCores::SetUp();
    stub_->on_execute = [this](int32_t core, TensorRefs inputs) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        cores_.insert(core);
      }
      if (on_chunk_) on_chunk_(core, inputs[0]);
      return Tensors{inputs[0] * 2};
    };
  }

  static at::Tensor rows(int64_t count, int64_t start = 0) {
    return at::arange(start, start + count, at::kFloat);
  }
  static at::Tensor run(torch::jit::Module& module, const at::Tensor& x) {
    return module.forward({x}).toTensor();
  }
  static std::string error_of(torch::jit::Module& module, const at::Tensor& x) {
    try {
      run(module, x);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "nothing thrown";
  }

  std::mutex mutex_;
  std::set<int32_t> cores_;
  std::function<void(int32_t, const at::Tensor&)> on_chunk_;
};

TEST_F(DataParallelTest, EveryRowComesBackFromAllCores) {
  auto model = traced();
  auto parallel = data_parallel(model);
  std::barrier all(4);  // passes only if four compute at once
  on_chunk_ = [&](int32_t, const at::Tensor&) { all.arrive_and_wait(); };
  EXPECT_TRUE(at::equal(run(parallel, rows(8)), rows(8) * 2));
  EXPECT_EQ(cores_, (std::set<int32_t>{0, 1, 2, 3}));
  on_chunk_ = nullptr;
  for (const int64_t count : {0, 1, 2, 3, 7, 64}) {
    EXPECT_TRUE(at::equal(run(parallel, rows(count)), rows(count) * 2)) << count;
  }
}

TEST_F(DataParallelTest, LoadsOncePerCoreAndNothingElse) {
  auto model = traced({.lazy_load = true});
  auto parallel = data_parallel(model, Cores{0, 2, 3});
  EXPECT_EQ(stub_->loads, 3);
  EXPECT_EQ(stub_->frees, 0);
  EXPECT_EQ(status(parallel).at(0).cores, Cores{0});
  EXPECT_EQ(status(parallel).at(1).cores, (Cores{2, 3}));
  run(parallel, rows(30));
  EXPECT_EQ(cores_, (std::set<int32_t>{0, 2, 3}));
  EXPECT_EQ(stub_->loads, 3);
}

TEST_F(DataParallelTest, AFailedLoadLeavesTheModuleWhereItWas) {
  auto model = loaded(saved(traced({.placement = {1, 1}})));
  for (const int32_t broken : {0, 3}) {
    stub_->on_load = [&](int32_t core) {
      if (core == broken) throw std::runtime_error("core is broken");
    };
    EXPECT_THROW(data_parallel(model, Cores{0, 2, 3}), std::runtime_error);
    EXPECT_EQ(status(model).at(0).cores, Cores{1});
    EXPECT_FALSE(status(model).at(0).dynamic_batch);
    EXPECT_EQ(stub_->alive(), 1);
  }
  stub_->on_load = [](int32_t) {};
}

TEST_F(DataParallelTest, IdsThatCannotBeAreRefused) {
  auto model = traced();
  for (const Cores& ids : {Cores{}, Cores{0, 0}, Cores{4}, Cores{-1}}) {
    EXPECT_THROW(data_parallel(model, ids), std::invalid_argument);
  }
  EXPECT_EQ(stub_->loads, 0);
}

TEST_F(DataParallelTest, IsSavedWithItsCores) {
  auto model = traced();
  auto again = loaded(saved(data_parallel(model, Cores{1, 3})));
  EXPECT_TRUE(at::equal(run(again, rows(9)), rows(9) * 2));
  EXPECT_EQ(cores_, (std::set<int32_t>{1, 3}));
}

TEST_F(DataParallelTest, AnErrorComesWhenNothingRunsAnyMore) {
  auto model = traced();
  auto parallel = data_parallel(model);
  std::latch failed(1);
  std::atomic<int> ended{0};
  on_chunk_ = [&](int32_t, const at::Tensor& x) {
    if (x[0].item<float>() == 4) {
      failed.count_down();
      throw std::runtime_error("four");
    }
    failed.wait();
    ++ended;
  };
  const std::string error = error_of(parallel, rows(8));
  EXPECT_NE(error.find("chunk 3 of 4 on core "), std::string::npos) << error;
  EXPECT_NE(error.find("four"), std::string::npos) << error;
  const int after = ended;
  on_chunk_ = nullptr;
  EXPECT_TRUE(at::equal(run(parallel, rows(8)), rows(8) * 2));
  EXPECT_EQ(ended, after);
}

TEST_F(DataParallelTest, WithoutDynamicBatchingChunksAreWhatWasTraced) {
  auto model = traced();
  auto parallel = data_parallel(model, Cores{0, 1});
  disable_dynamic_batching(parallel);
  EXPECT_TRUE(at::equal(run(parallel, rows(4)), rows(4) * 2));
  const std::string error = error_of(parallel, rows(6));
  EXPECT_NE(error.find("expected a float32 tensor of shape [2]"), std::string::npos) << error;
  EXPECT_THROW(disable_dynamic_batching(model), std::invalid_argument);
}

TEST_F(DataParallelTest, ManyThreadsGetTheirOwnRows) {
  auto model = traced();
  const auto parallel = data_parallel(model, Cores{0, 2, 3});
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int64_t id = 0; id < 8; ++id) {
    threads.emplace_back([&, id] {
      auto mine = parallel;
      for (int64_t count = 0; count < 40; ++count) {
        const auto x = rows(count, 1000 * id);
        if (!at::equal(run(mine, x), x * 2)) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(DataParallelTest, WhatChunksOfAModelTakeSaysNothingOfAnother) {
  using std::chrono::nanoseconds;
  parallel::ChunkTimes times;
  auto model = std::make_unique<torch::jit::Module>(traced());
  const auto other = traced();
  times.of(*model)->note(nanoseconds(1));
  EXPECT_TRUE(times.of(*model)->below(nanoseconds(2)));
  EXPECT_TRUE(times.of(model->copy())->below(nanoseconds(2)));
  EXPECT_FALSE(times.of(other)->below(std::chrono::hours(1)));
  EXPECT_EQ(times.size(), 2U);
  // Where a model was that is gone, a new one finds nothing of it.
  model.reset();
  const auto next = traced();
  EXPECT_FALSE(times.of(next)->below(std::chrono::hours(1)));
  EXPECT_EQ(times.size(), 2U);
}

}  // namespace
}  // namespace neuron
