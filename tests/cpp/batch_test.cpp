#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

#include "stub_backend.h"
#include "subgraph/operations.h"

namespace neuron::subgraph {
namespace {

using runtime::TensorRefs;
using runtime::Tensors;
using testing::Executable;

/// A subgraph of x [3, 2] and y [3] to x + 1 [3, 2] and y * 2 [3], on four stub cores.
class BatchTest : public testing::OnStubCores {
 protected:
  void SetUp() override {
    OnStubCores::SetUp();
    stub_->on_execute = [this](int32_t core, TensorRefs inputs) {
      const std::lock_guard<std::mutex> lock(mutex_);
      cores_.insert(core);
      ++executions_;
      EXPECT_EQ(inputs[0].sizes(), at::IntArrayRef({3, 2}));
      EXPECT_EQ(inputs[1].sizes(), at::IntArrayRef({3}));
      EXPECT_TRUE(inputs[0].is_contiguous() && inputs[1].is_contiguous());
      return Tensors{inputs[0] + 1, inputs[1] * 2};
    };
  }

  static Executable executable() {
    Executable made;
    made.name = "stub";
    made.inputs = {{"x", at::kFloat, {3, 2}}, {"y", at::kLong, {3}}};
    made.outputs = {{"", at::kFloat, {3, 2}}, {"", at::kLong, {3}}};
    made.graph = std::make_shared<runtime::Content>(at::zeros({1}, at::kByte), "", 0);
    return made;
  }

  static SubgraphHandle batched(int32_t cores) {
    const Wishes wishes{.dynamic_batch = true, .placement = {0, cores}};
    return NeuronSubgraph::from_file(encode(executable(), wishes));
  }

  static std::string refusal(const SubgraphHandle& handle, TensorRefs inputs) {
    try {
      forward(inputs, handle);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  }

  static std::string refusal_to_batch(const Executable& changed) {
    const auto handle = NeuronSubgraph::from_trace(encode(changed, {}));
    try {
      set_dynamic_batch({handle}, true);
    } catch (const std::invalid_argument& error) {
      EXPECT_FALSE(status({handle})[0].dynamic_batch);
      return error.what();
    }
    return "accepted";
  }

  std::mutex mutex_;
  std::set<int32_t> cores_;
  int executions_ = 0;
};

void expect_part(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

TEST_F(BatchTest, EveryRowComesBackInOrderForAnyBatchAndCores) {
  for (const int32_t cores : {1, 2, 4}) {
    const auto handle = batched(cores);
    for (int64_t rows = 0; rows <= 40; ++rows) {
      const at::Tensor x = at::arange(rows * 2, at::kFloat).reshape({rows, 2});
      const at::Tensor y = at::arange(rows, at::kLong);
      const Tensors outputs = forward(Tensors{x, y}, handle);
      ASSERT_TRUE(at::equal(outputs[0], x + 1)) << rows;
      ASSERT_TRUE(at::equal(outputs[1], y * 2)) << rows;
    }
  }
}

TEST_F(BatchTest, ChunksOfOneCallRunOnAllReplicasAtOnce) {
  const auto handle = batched(4);
  std::latch together(4);  // passes only if four chunks compute at the same time
  stub_->on_execute = [&](int32_t, TensorRefs inputs) {
    together.arrive_and_wait();
    return Tensors(inputs.begin(), inputs.end());
  };
  forward(Tensors{at::zeros({12, 2}), at::zeros({12}, at::kLong)}, handle);
  EXPECT_EQ(status({handle})[0].executions, (std::vector<int64_t>{1, 1, 1, 1}));
}

TEST_F(BatchTest, PaddedRowsNeverLeave) {
  const auto handle = batched(1);
  stub_->on_execute = [](int32_t, TensorRefs inputs) {
    EXPECT_EQ(inputs[1][1].item<int64_t>(), 7) << "the last row stands for those that are missing";
    EXPECT_EQ(inputs[1][2].item<int64_t>(), 7);
    return Tensors(inputs.begin(), inputs.end());
  };
  const auto outputs = forward(Tensors{at::ones({1, 2}), at::full({1}, 7, at::kLong)}, handle);
  EXPECT_EQ(outputs[0].sizes(), at::IntArrayRef({1, 2}));
  EXPECT_EQ(outputs[0].storage().nbytes(), 2 * sizeof(float));
}

TEST_F(BatchTest, StridedInputsArriveDense) {
  const auto handle = batched(2);
  const at::Tensor x = at::arange(40, at::kFloat).reshape({2, 20}).t();
  const at::Tensor y = at::arange(40, at::kLong).slice(0, 0, 40, 2);
  const Tensors outputs = forward(Tensors{x, y}, handle);
  EXPECT_TRUE(at::equal(outputs[0], x + 1));
  EXPECT_TRUE(at::equal(outputs[1], y * 2));
}

TEST_F(BatchTest, WrongBatchesAreNamedAndNothingRuns) {
  const auto handle = batched(2);
  const at::Tensor y = at::zeros({5}, at::kLong);
  expect_part(refusal(handle, Tensors{at::zeros({5, 3}), y}),
              "input 'x' of subgraph 'stub': expected a float32 tensor of shape [5, 2]");
  expect_part(refusal(handle, Tensors{at::zeros({5, 2}), at::zeros({4}, at::kLong)}),
              "input 'y' of subgraph 'stub': expected an int64 tensor of shape [5] on cpu, got an "
              "int64 tensor of shape [4]");
  expect_part(refusal(handle, Tensors{at::zeros({5, 2}, at::kDouble), y}), "got a float64 tensor");
  expect_part(refusal(handle, Tensors{at::zeros({}), y}), "got a float32 tensor of shape []");
  expect_part(refusal(handle, Tensors{at::zeros({5, 2})}), "takes 2 input tensors (x, y), got 1");
  expect_part(refusal(handle, Tensors{at::Tensor(), y}), "got None");
  EXPECT_EQ(executions_, 0);
}

TEST_F(BatchTest, WhatHasNoBatchCannotBeBatched) {
  EXPECT_EQ(refusal_to_batch(executable()), "accepted");
  Executable changed = executable();
  changed.inputs[1].shape = {4};
  expect_part(refusal_to_batch(changed), "its inputs 'x' and 'y' have 3 and 4 rows");
  changed = executable();
  changed.inputs[1].shape = {};
  expect_part(refusal_to_batch(changed), "its input 'y' has none");
  changed = executable();
  changed.outputs[1].shape = {};
  expect_part(refusal_to_batch(changed), "its output 1 has shape []");
  changed = executable();
  changed.outputs[0].shape = {2, 3};
  expect_part(refusal_to_batch(changed), "its output 0 has shape [2, 3]");
  changed = executable();
  changed.mutated_inputs = {1};
  expect_part(refusal_to_batch(changed), "it updates its input 'y'");
  changed = executable();
  changed.inputs.clear();
  expect_part(refusal_to_batch(changed), "it has no inputs");
}

TEST_F(BatchTest, AFlagThatAFileClaimsForWhatHasNoBatchIsRefusedAtTheCall) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {0, 2}}) {
    Executable changed = executable();
    changed.inputs[0].shape = shape;
    const auto handle = NeuronSubgraph::from_file(encode(changed, {.dynamic_batch = true}));
    expect_part(refusal(handle, Tensors{at::zeros({5, 2}), at::zeros({5}, at::kLong)}),
                "cannot take batches of any size");
  }
  EXPECT_EQ(executions_, 0);
}

TEST_F(BatchTest, AllOfSeveralOrNone) {
  const auto good = NeuronSubgraph::from_trace(encode(executable(), {}));
  Executable changed = executable();
  changed.outputs[0].shape = {};
  const auto bad = NeuronSubgraph::from_trace(encode(changed, {}));
  EXPECT_THROW(set_dynamic_batch({good, bad}, true), std::invalid_argument);
  EXPECT_FALSE(status({good})[0].dynamic_batch);
}

TEST_F(BatchTest, AFailingChunkIsNamedAndTheOthersHaveEnded) {
  const auto handle = batched(4);
  std::atomic<int> running{0};
  stub_->on_execute = [&](int32_t, TensorRefs inputs) -> Tensors {
    ++running;
    if (inputs[1][0].item<int64_t>() == 6) {
      --running;
      throw std::runtime_error("no such luck");
    }
    --running;
    return {inputs.begin(), inputs.end()};
  };
  try {
    forward(Tensors{at::zeros({30, 2}), at::arange(30, at::kLong)}, handle);
    FAIL() << "nothing thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "chunk 3 of 10: no such luck");
  }
  EXPECT_EQ(running, 0);
  EXPECT_EQ(runtime::Runtime::get().scheduler().queued(), 0);
}

}  // namespace
}  // namespace neuron::subgraph
