#pragma once

#include <torch/csrc/jit/api/module.h>

#include <memory>

#include "runtime/backend.h"

namespace neuron::runtime::host {

/// A portable graph, run by TorchScript's interpreter: what the replicas of one executable share,
/// weights included. Thread-safe.
class TorchScriptProgram : public std::enable_shared_from_this<TorchScriptProgram> {
 public:
  /// @throws std::runtime_error if the graph cannot be read.
  static std::shared_ptr<TorchScriptProgram> load(std::shared_ptr<const Executable> executable);

  std::unique_ptr<Replica> make_replica(int32_t intra_op_threads);

 private:
  friend class TorchScriptReplica;
  explicit TorchScriptProgram(std::shared_ptr<const Executable> executable);

  const std::shared_ptr<const Executable> executable_;
  const std::shared_ptr<const torch::jit::Module> module_;
};

}  // namespace neuron::runtime::host
