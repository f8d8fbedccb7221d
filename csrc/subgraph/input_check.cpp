#include "subgraph/input_check.h"

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

void check_input(const Executable& executable, const TensorSpec& spec, const at::Tensor& input,
                 const std::string& rule) {
  if (fits(spec, input)) return;
  throw std::invalid_argument(message("input '", spec.name, "' of subgraph '", executable.name,
                                      "': expected ", describe(spec.dtype, spec.shape),
                                      " on cpu, got ", describe(input), "; ", rule));
}

void check_inputs(const Executable& executable, runtime::TensorRefs inputs) {
  if (inputs.size() != executable.inputs.size()) {
    std::vector<std::string> names;
    for (const auto& spec : executable.inputs) names.push_back(spec.name);
    throw std::invalid_argument(message("subgraph '", executable.name, "' takes ",
                                        executable.inputs.size(), " input tensors (", join(names),
                                        "), got ", inputs.size()));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_input(executable, executable.inputs[i], inputs[i],
                "a traced module takes what it was traced with");
  }
}

}  // namespace neuron::subgraph
