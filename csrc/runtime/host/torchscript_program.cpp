#include "runtime/host/torchscript_program.h"

#include <caffe2/serialize/read_adapter_interface.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "common/message.h"
#include "runtime/host/integrity.h"
#include "runtime/host/thread_settings.h"

namespace neuron::runtime::host {
namespace {

/// Reads an archive out of a tensor.
class TensorReader final : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit TensorReader(at::Tensor bytes) : bytes_(std::move(bytes)) {}

  size_t size() const override { return static_cast<size_t>(bytes_.numel()); }

  size_t read(uint64_t position, void* buffer, size_t count, const char* /*what*/) const override {
    if (position >= size()) return 0;
    count = std::min(count, size() - static_cast<size_t>(position));
    std::memcpy(buffer, static_cast<const char*>(bytes_.const_data_ptr()) + position, count);
    return count;
  }

 private:
  const at::Tensor bytes_;
};

torch::jit::Module read_graph(const Executable& executable) {
  try {
    auto module = torch::jit::load(std::make_shared<TensorReader>(executable.graph));
    module.eval();
    return module;
  } catch (const c10::Error& error) {
    throw std::runtime_error(message("the portable graph of subgraph '", executable.name,
                                     "' cannot be read: ", error.what_without_backtrace()));
  }
}

}  // namespace

class TorchScriptReplica final : public Replica {
 public:
  TorchScriptReplica(std::shared_ptr<const TorchScriptProgram> program, int32_t intra_op_threads)
      : program_(std::move(program)),
        forward_(program_->module_.get_method("forward")),
        intra_op_threads_(intra_op_threads) {}

  std::vector<at::Tensor> execute(const std::vector<at::Tensor>& inputs) override {
    const CoreScope scope(intra_op_threads_);
    std::vector<c10::IValue> arguments(inputs.begin(), inputs.end());
    const c10::IValue result = forward_(std::move(arguments));
    std::vector<at::Tensor> outputs;
    if (result.isTensor()) {
      outputs.push_back(result.toTensor());
    } else if (result.isTensorList()) {
      outputs = result.toTensorVector();
    } else {
      for (const auto& element : result.toTupleRef().elements()) {
        outputs.push_back(element.toTensor());
      }
    }
    if (outputs.size() != program_->executable_->outputs.size()) {
      throw std::runtime_error(
          message("the portable graph gave ", outputs.size(), " outputs instead of ",
                  program_->executable_->outputs.size(), ": the file is damaged"));
    }
    return outputs;
  }

 private:
  const std::shared_ptr<const TorchScriptProgram> program_;
  torch::jit::Method forward_;
  const int32_t intra_op_threads_;
};

TorchScriptProgram::TorchScriptProgram(std::shared_ptr<const Executable> executable)
    : executable_(std::move(executable)), module_(read_graph(*executable_)) {}

std::shared_ptr<TorchScriptProgram> TorchScriptProgram::load(
    std::shared_ptr<const Executable> executable) {
  check_integrity(*executable, Format::kTorchScript);
  return std::shared_ptr<TorchScriptProgram>(new TorchScriptProgram(std::move(executable)));
}

std::unique_ptr<Replica> TorchScriptProgram::make_replica(int32_t intra_op_threads) {
  return std::make_unique<TorchScriptReplica>(shared_from_this(), intra_op_threads);
}

}  // namespace neuron::runtime::host
