// Held tensors over a stub backend: x [2] and weight [2], state [2] to (x * weight, state + x).
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <neuron_ext/weights.h>
#include <torch/script.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "stub_backend.h"
#include "subgraph/held_tensors.h"
#include "subgraph/operations.h"

namespace neuron::subgraph {
namespace {

using runtime::TensorRefs;
using runtime::Tensors;
using testing::Executable;

at::Tensor values(std::vector<float> numbers) {
  return at::tensor(at::ArrayRef<float>(numbers));
}

class HeldTensorsTest : public testing::OnStubCores {
 protected:
  void SetUp() override {
    OnStubCores::SetUp();
    stub_->on_execute = [this](int32_t, TensorRefs in) {
      if (fail_) throw std::runtime_error("it broke");
      Tensors out{in[0] * in[1]};
      if (in.size() == 3) out.push_back(in[2] + in[0]);
      return out;
    };
  }

  static Executable executable(bool with_state) {
    Executable made;
    made.name = "stub";
    made.inputs = {{"x", at::kFloat, {2}}, {"inner.weight", at::kFloat, {2}}};
    made.outputs = {{"", at::kFloat, {2}}};
    made.held_inputs = 1;
    made.tied_names = {{"tied", 1}};
    if (with_state) {
      made.inputs.push_back({"state", at::kFloat, {2}});
      made.outputs.push_back({"", at::kFloat, {2}});
      made.held_inputs = 2;
      made.aliases = {{2, 1, at::zeros({4}, at::kByte)}};
    }
    made.graph = std::make_shared<runtime::Content>(at::zeros({1}, at::kByte), "", 0);
    return made;
  }

  static SubgraphHandle handle(bool with_state) {
    return NeuronSubgraph::from_file(encode(executable(with_state), {}));
  }

  /// A module with the tensors beside the subgraph.
  static torch::jit::Module module(bool with_state) {
    torch::jit::Module inner("inner");
    inner.register_parameter("weight", values({1, 1}), false);
    torch::jit::Module made("made");
    made.register_module("inner", inner);
    made.register_buffer("state", values({0, 0}));
    made.register_attribute("subgraph", c10::getCustomClassType<SubgraphHandle>(),
                            c10::IValue(handle(with_state)));
    return made;
  }

  template <typename Call>
  static std::string refusal(Call call) {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  }

  std::atomic<bool> fail_{false};
};

TEST_F(HeldTensorsTest, TheFieldsSurviveTheFile) {
  const Executable before = executable(true);
  const auto after = decode(encode(before, {}), Origin::kFile).executable;
  EXPECT_EQ(after->held_inputs, 2);
  EXPECT_EQ(after->user_inputs(), 1U);
  EXPECT_EQ(after->tied_names, before.tied_names);
  ASSERT_EQ(after->aliases.size(), 1U);
  EXPECT_EQ(after->aliases[0].input, 2);
  EXPECT_EQ(after->aliases[0].output, 1);
  EXPECT_TRUE(at::equal(after->aliases[0].initial, before.aliases[0].initial));
}

TEST_F(HeldTensorsTest, AFileWithoutHeldTensorsHasNoFieldOfThem) {
  Executable plain = executable(false);
  plain.held_inputs = 0;
  plain.tied_names.clear();
  const State state = encode(plain, {});
  EXPECT_FALSE(std::get<1>(state).contains("held_inputs"));
  EXPECT_FALSE(std::get<3>(state).contains("state_inputs"));
  EXPECT_FALSE(std::get<4>(state).contains("tied_names"));
}

TEST_F(HeldTensorsTest, BadFieldsAreNamed) {
  const auto with = [](const std::string& field, std::vector<int64_t> numbers) {
    State state = encode(executable(true), {});
    std::get<3>(state).insert_or_assign(field, c10::List<int64_t>(numbers));
    try {
      decode(state, Origin::kTrace);
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const auto names = [](const std::string& text, const std::string& field) {
    return text.find("'" + field + "'") != std::string::npos;
  };
  EXPECT_EQ(with("state_inputs", {2}), "accepted");
  for (const std::vector<int64_t>& bad : {std::vector<int64_t>{0}, {3}, {-1}, {}, {2, 2}}) {
    EXPECT_NE(with("state_inputs", bad), "accepted");
  }
  EXPECT_TRUE(names(with("state_inputs", {0}), "state_inputs"));
  EXPECT_TRUE(names(with("state_outputs", {2}), "state_outputs"));
  EXPECT_TRUE(names(with("state_outputs", {-1}), "state_outputs"));
  EXPECT_TRUE(names(with("state_initial_sizes", {5}), "state_initial_sizes"));
  EXPECT_TRUE(names(with("state_initial_sizes", {8}), "state_initial_sizes"));
  EXPECT_TRUE(names(with("tied_inputs", {0}), "tied_inputs"));
  EXPECT_TRUE(names(with("tied_inputs", {1, 1}), "tied_inputs"));
}

TEST_F(HeldTensorsTest, ACallUpdatesTheState) {
  const auto subgraph = handle(true);
  const Tensors held{values({2, 3}), values({10, 20})};
  const Tensors inputs{values({1, 2})};
  EXPECT_TRUE(at::equal(forward_held(inputs, held, subgraph)[0], values({2, 6})));
  EXPECT_TRUE(at::equal(held[1], values({11, 22})));
  forward_held(inputs, held, subgraph);
  EXPECT_TRUE(at::equal(held[1], values({12, 24})));
}

TEST_F(HeldTensorsTest, AFailedCallLeavesTheState) {
  const auto subgraph = handle(true);
  const Tensors held{values({2, 3}), values({10, 20})};
  fail_ = true;
  EXPECT_THROW(forward_held(Tensors{values({1, 2})}, held, subgraph), std::runtime_error);
  EXPECT_TRUE(at::equal(held[1], values({10, 20})));
}

TEST_F(HeldTensorsTest, AnOutputThatDoesNotFitLeavesTheState) {
  stub_->on_execute = [](int32_t, TensorRefs in) { return Tensors{in[0], at::ones({3})}; };
  const auto subgraph = handle(true);
  const Tensors held{values({2, 3}), values({10, 20})};
  EXPECT_THROW(forward_held(Tensors{values({1, 2})}, held, subgraph), std::runtime_error);
  EXPECT_TRUE(at::equal(held[1], values({10, 20})));
}

TEST_F(HeldTensorsTest, NoOutputIsAViewOfAHeldTensor) {
  stub_->on_execute = [](int32_t, TensorRefs in) { return Tensors{in[1].view({2}), in[2]}; };
  const auto subgraph = handle(true);
  const Tensors held{values({2, 3}), values({10, 20})};
  const Tensors outputs = forward_held(Tensors{values({1, 2})}, held, subgraph);
  EXPECT_FALSE(share_storage(outputs[0], held[0]));
  EXPECT_TRUE(at::equal(outputs[0], held[0]));
  EXPECT_TRUE(at::equal(held[1], values({10, 20})));
}

TEST_F(HeldTensorsTest, WhatDoesNotFitIsNamed) {
  const auto subgraph = handle(true);
  const Tensors good{values({2, 3}), values({10, 20})};
  const Tensors bad{values({2, 3}), at::zeros({3})};
  const Tensors none{values({2, 3}), at::Tensor()};
  const Tensors x{values({1, 2})};
  EXPECT_NE(refusal([&] { forward_held(x, bad, subgraph); }).find("held tensor 'state'"),
            std::string::npos);
  EXPECT_NE(refusal([&] { forward_held(x, none, subgraph); }).find("held tensor 'state'"),
            std::string::npos);
  EXPECT_NE(
      refusal([&] { forward_held(Tensors{at::zeros({3})}, good, subgraph); }).find("input 'x'"),
      std::string::npos);
  const std::string count = refusal([&] { forward_held(Tensors{}, good, subgraph); });
  EXPECT_NE(count.find("takes 1 input tensors (x), got 0"), std::string::npos) << count;
  EXPECT_NE(refusal([&] { forward_held(x, Tensors{good[0]}, subgraph); }).find("holds 2 tensors"),
            std::string::npos);
}

TEST_F(HeldTensorsTest, ReplaceChecksAllBeforeItTouchesAny) {
  torch::jit::Module made = module(false);
  const at::Tensor weight = made.attr("inner").toModule().attr("weight").toTensor();
  const auto text = refusal(
      [&] { replace_weights(made, {{"other", values({1, 2})}, {"state", values({1, 2})}}); });
  EXPECT_NE(text.find("missing: inner.weight"), std::string::npos) << text;
  EXPECT_NE(text.find("other"), std::string::npos) << text;
  EXPECT_NE(text.find("state"), std::string::npos) << text;
  EXPECT_NE(refusal([&] { replace_weights(made, {{"tied", at::zeros({3})}}); }).find("shape [3]"),
            std::string::npos);
  EXPECT_NE(refusal([&] {
              replace_weights(made, {{"inner.weight", values({1, 2})}, {"tied", values({1, 3})}});
            }).find("differ"),
            std::string::npos);
  EXPECT_TRUE(at::equal(weight, values({1, 1})));
  EXPECT_TRUE(replace_weights(made, {{"inner.weight", values({5, 6})}}));
  EXPECT_TRUE(at::equal(weight, values({5, 6})));
  EXPECT_TRUE(replace_weights(made, {{"tied", values({7, 8})}}));
  EXPECT_TRUE(at::equal(weight, values({7, 8})));
}

TEST_F(HeldTensorsTest, StateIsNoWeight) {
  torch::jit::Module made = module(true);
  EXPECT_TRUE(replace_weights(made, {{"inner.weight", values({5, 6})}, {"state", values({9, 9})}}));
  EXPECT_TRUE(at::equal(made.attr("state").toTensor(), values({0, 0})));
  made.attr("state").toTensor().fill_(3);
  reset_state(made);
  EXPECT_TRUE(at::equal(made.attr("state").toTensor(), values({0, 0})));
}

TEST_F(HeldTensorsTest, AModuleWithoutSeparatedWeightsSaysSo) {
  torch::jit::Module empty("empty");
  EXPECT_FALSE(replace_weights(empty, {{"a", values({1})}}));
  reset_state(empty);
}

TEST_F(HeldTensorsTest, RequestsSeeOldWeightsOrNew) {
  torch::jit::Module made = module(false);
  const Tensors held{made.attr("inner").toModule().attr("weight").toTensor()};
  const auto subgraph = made.attr("subgraph").toCustomClass<NeuronSubgraph>();
  std::atomic<bool> stop{false};
  std::atomic<int> mixed{0};
  std::atomic<int> done{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      while (!stop) {
        const at::Tensor out = forward_held(Tensors{values({1, 1})}, held, subgraph)[0];
        if (out[0].item<float>() != out[1].item<float>()) ++mixed;
        ++done;
      }
    });
  }
  for (int i = 0; i < 300 || done < 300; ++i) {
    const auto value = static_cast<float>(i);
    replace_weights(made, {{"inner.weight", values({value, value})}});
  }
  stop = true;
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(mixed, 0);
}

TEST_F(HeldTensorsTest, CallsOnOneStateRunOneAfterAnother) {
  const auto subgraph = handle(true);
  const Tensors held{values({1, 1}), values({0, 0})};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int k = 0; k < 100; ++k) forward_held(Tensors{values({1, 2})}, held, subgraph);
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_TRUE(at::equal(held[1], values({400, 800})));
}

TEST(CopyInPlace, CopiesEveryByteOfManyTensors) {
  std::vector<TensorCopy> copies;
  // Enough for several threads, with pieces that no part of the work ends at.
  for (int64_t i = 0; i < 40; ++i) {
    const at::Tensor from = at::randint(0, 256, {(int64_t{1} << 20) + 13 * i}, at::kByte);
    copies.push_back({at::zeros_like(from), from});
  }
  copies.push_back({at::zeros({0}), at::zeros({0})});
  copies.push_back({at::zeros({3, 2}), at::arange(6.0F).reshape({2, 3}).t()});
  copy_in_place(copies);
  for (const auto& [to, from] : copies) EXPECT_TRUE(at::equal(to, from));
}

TEST(Gates, BelongToTheStorageOfTheTensor) {
  const at::Tensor one = at::zeros({4});
  EXPECT_EQ(gate_of(one), gate_of(one.view({2, 2})));
  EXPECT_NE(gate_of(one), gate_of(at::zeros({4})));
  const auto* const gate = gate_of(one).get();
  for (int i = 0; i < 1000; ++i) gate_of(at::zeros({4}));  // entries that go again
  EXPECT_EQ(gate_of(one).get(), gate);
}

}  // namespace
}  // namespace neuron::subgraph
