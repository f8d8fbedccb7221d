#pragma once

#include <memory>

#include "runtime/backend.h"

namespace neuron::runtime::host {

/// Native code made by AOTInductor, mapped, with its constants: what the replicas of one executable
/// share. The constants are views of the executable's weights, not copies. Thread-safe.
class InductorProgram : public std::enable_shared_from_this<InductorProgram> {
 public:
  virtual ~InductorProgram() = default;

  /// @throws std::runtime_error if the code cannot be mapped or does not fit its specification.
  static std::shared_ptr<InductorProgram> load(std::shared_ptr<const Executable> executable);

  /// One more instance of the code over the same constants.
  virtual std::unique_ptr<Replica> make_replica(int32_t intra_op_threads) = 0;
};

}  // namespace neuron::runtime::host
