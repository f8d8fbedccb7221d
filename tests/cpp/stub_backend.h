#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/backend.h"
#include "runtime/runtime.h"
#include "subgraph/neuron_subgraph.h"

namespace neuron::testing {

using runtime::Executable;
using runtime::TensorRefs;
using runtime::Tensors;

/// What a StubBackend does, and what it has seen. Shared by the backend, its replicas and the test.
struct Stub {
  /// Called by each load with the core; may block or throw.
  std::function<void(int32_t core)> on_load = [](int32_t) {};
  /// Called by each inference with the core; its result is the inference's.
  std::function<Tensors(int32_t core, TensorRefs inputs)> on_execute =
      [](int32_t, TensorRefs inputs) { return Tensors(inputs.begin(), inputs.end()); };
  bool may_borrow_thread = false;
  /// Called before each inference that is not brief and computes on the thread that asked for it.
  std::function<void(int32_t core)> on_borrow = [](int32_t) {};

  std::atomic<int> loads{0};    ///< that succeeded
  std::atomic<int> frees{0};    ///< of what was loaded
  std::atomic<int> loading{0};  ///< now
  int alive() const { return loads - frees; }
};

class StubReplica final : public runtime::Replica {
 public:
  StubReplica(std::shared_ptr<Stub> stub, int32_t core) : stub_(std::move(stub)), core_(core) {
    ++stub_->loads;
  }
  ~StubReplica() override { ++stub_->frees; }
  Tensors execute(TensorRefs inputs) override { return stub_->on_execute(core_, inputs); }

 private:
  const std::shared_ptr<Stub> stub_;
  const int32_t core_;
};

class StubBackend final : public runtime::Backend {
 public:
  StubBackend(std::shared_ptr<Stub> stub, int32_t cores) : stub_(std::move(stub)), cores_(cores) {}
  std::string name() const override { return "stub"; }
  int32_t core_count() const override { return cores_; }
  std::vector<int32_t> cpus(int32_t core) const override { return {core}; }
  std::unique_ptr<runtime::Replica> load(const std::shared_ptr<const Executable>&,
                                         int32_t core) override {
    struct Count {
      std::atomic<int>& counter;
      explicit Count(std::atomic<int>& c) : counter(c) { ++counter; }
      ~Count() { --counter; }
    } count(stub_->loading);
    stub_->on_load(core);
    return std::make_unique<StubReplica>(stub_, core);
  }
  void adopt_core_thread(int32_t) override {}
  bool may_borrow_thread(int32_t) const override { return stub_->may_borrow_thread; }
  void run_borrowed(int32_t core, c10::function_ref<void()> work) override {
    stub_->on_borrow(core);
    work();
  }

 private:
  const std::shared_ptr<Stub> stub_;
  const int32_t cores_;
};

/// Tests on a runtime of four stub cores, which must end with nothing left loaded.
class OnStubCores : public ::testing::Test {
 protected:
  void SetUp() override {
    runtime::Runtime::install_for_testing(std::make_unique<StubBackend>(stub_, 4), {});
  }
  void TearDown() override {
    runtime::Runtime::uninstall_for_testing();
    EXPECT_EQ(stub_->alive(), 0) << "replicas were left loaded";
  }

  const std::shared_ptr<Stub> stub_ = std::make_shared<Stub>();
};

/// The state of a subgraph that takes one float32 tensor of shape [2] and gives one.
inline subgraph::State make_state(const subgraph::Wishes& wishes = {},
                                  std::vector<int64_t> mutated_inputs = {}) {
  Executable executable;
  executable.name = "stub";
  executable.format = runtime::Format::kTorchScript;
  executable.inputs = {{"x", at::kFloat, {2}}};
  executable.outputs = {{"", at::kFloat, {2}}};
  executable.mutated_inputs = std::move(mutated_inputs);
  executable.graph = std::make_shared<runtime::Content>(at::zeros({1}, at::kByte), "", 0);
  return subgraph::encode(executable, wishes);
}

}  // namespace neuron::testing
