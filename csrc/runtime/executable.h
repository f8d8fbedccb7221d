#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/content.h"
#include "runtime/signature.h"

namespace neuron::runtime {

/// What goes into and comes out of an inference. A few tensors stand in the object itself: no
/// allocation is made for them on the way of a call.
using Tensors = c10::SmallVector<at::Tensor, 4>;
using TensorRefs = c10::ArrayRef<at::Tensor>;

/// What one input or output of a subgraph is.
struct TensorSpec {
  std::string name;  ///< of inputs: as the user knows it, say "x" or "y['mask']"
  at::ScalarType dtype = at::ScalarType::Float;
  std::vector<int64_t> shape;
};

/// One constant of `inductor` code: where it stands in the weights and how to read it.
struct ConstantSpec {
  std::string name;  ///< the code's own name for it
  std::string fqn;  ///< the model's name for it, say "conv.weight"; the code's own if it was folded
  at::ScalarType dtype = at::ScalarType::Float;
  at::Layout layout = at::kStrided;  ///< or kMkldnn: packed for oneDNN
  int64_t offset = 0;                ///< in bytes
  int64_t size = 0;                  ///< in bytes, padding included
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  std::vector<uint8_t> opaque;  ///< oneDNN's description of a packed constant
};

/// What a machine must have to run native code.
struct Requirements {
  std::string arch;                       ///< as uname -m says it
  std::vector<std::string> cpu_features;  ///< as /proc/cpuinfo spells them
  std::string torch_version;              ///< "2.13.0"
  std::string runtime;                    ///< "host"; told, not checked
};

enum class Format { kInductor, kTorchScript, kNeff };

const char* to_string(Format format);

/// A held tensor that each inference replaces by one of its outputs.
struct StateAlias {
  int64_t input = 0;
  int64_t output = 0;
  at::Tensor
      initial;  ///< uint8: the bytes of the initial value, or of one element if all are equal
};

/// The compiled artefact of a subgraph with its weights and specification. Never changes after it
/// is made, so that any number of threads and replicas may share it. Contents are null where the
/// format has none.
struct Executable {
  std::string name;
  std::string producer;  ///< what wrote it, say "neuron_ext 0.1.0"; told, not checked
  Format format = Format::kTorchScript;
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
  /// How many of the inputs, the last ones, are held by the module: weights and state. Their names
  /// are those of the module's tensors.
  int64_t held_inputs = 0;
  std::vector<std::pair<std::string, int64_t>> tied_names;  ///< further names, positions of inputs
  std::vector<StateAlias> aliases;
  std::vector<int64_t> mutated_inputs;  ///< positions of inputs that the computation updates
  Requirements requirements;
  ContentPtr code;     ///< kInductor: a shared library
  ContentPtr weights;  ///< kInductor: the constants
  std::vector<ConstantSpec> constants;
  ContentPtr graph;  ///< kTorchScript, and a fall back for kInductor: a TorchScript archive
  std::shared_ptr<SignatureSlot> signature = std::make_shared<SignatureSlot>();  ///< never null

  /// How many inputs come from the caller.
  size_t user_inputs() const { return inputs.size() - static_cast<size_t>(held_inputs); }
};

}  // namespace neuron::runtime
