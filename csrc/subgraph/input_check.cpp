#include "subgraph/input_check.h"

#include <algorithm>
#include <stdexcept>

#include "common/message.h"
#include "subgraph/state.h"

namespace neuron::subgraph {
namespace {

using runtime::Executable;
using runtime::TensorSpec;

std::string describe(at::ScalarType dtype, at::IntArrayRef shape) {
  const std::string& name = dtype_name(dtype);
  return message(name.front() == 'i' ? "an " : "a ", name, " tensor of shape [", join(shape), "]");
}

std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "None";
  if (tensor.layout() != at::kStrided) return message("a tensor of layout ", tensor.layout());
  return message(describe(tensor.scalar_type(), tensor.sizes()), " on ", tensor.device());
}

bool fits(const TensorSpec& spec, const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && tensor.is_cpu() &&
         tensor.scalar_type() == spec.dtype && tensor.sizes() == at::IntArrayRef(spec.shape);
}

}  // namespace

bool inputs_fit(const Executable& executable, runtime::TensorRefs inputs) {
  if (inputs.size() != executable.inputs.size()) return false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!fits(executable.inputs[i], inputs[i])) return false;
  }
  return true;
}

std::string misfit_of(const TensorSpec& spec, const at::Tensor& tensor) {
  if (fits(spec, tensor)) return {};
  return message("expected ", describe(spec.dtype, spec.shape), " on cpu, got ", describe(tensor));
}

void check_input(const Executable& executable, const TensorSpec& spec, const at::Tensor& input,
                 const std::string& rule) {
  if (fits(spec, input)) return;
  const auto position = static_cast<size_t>(&spec - executable.inputs.data());
  const bool held = position < executable.inputs.size() && position >= executable.user_inputs();
  throw std::invalid_argument(message(held ? "held tensor '" : "input '", spec.name,
                                      "' of subgraph '", executable.name,
                                      "': ", misfit_of(spec, input), "; ", rule));
}

void check_inputs(const Executable& executable, runtime::TensorRefs inputs) {
  if (inputs.size() != executable.inputs.size()) {
    std::vector<std::string> names;
    const size_t users = executable.user_inputs();
    for (size_t i = 0; i < users; ++i) names.push_back(executable.inputs[i].name);
    const auto held = static_cast<size_t>(executable.held_inputs);
    throw std::invalid_argument(
        message("subgraph '", executable.name, "' takes ", users, " input tensors (", join(names),
                "), got ", inputs.size() - std::min(inputs.size(), held),
                held > 0 ? message(" beside the ", held, " that its module holds") : ""));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_input(executable, executable.inputs[i], inputs[i],
                "a traced module takes what it was traced with");
  }
}

}  // namespace neuron::subgraph
