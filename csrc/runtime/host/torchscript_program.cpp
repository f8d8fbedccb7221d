#include "runtime/host/torchscript_program.h"

#include <caffe2/serialize/read_adapter_interface.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

#include "common/message.h"
#include "common/mutex.h"
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

/// Counts the graphs that this thread is reading, each inside the one before: a graph may hold a
/// subgraph, which has a graph. A file could go on like that until the stack is used up.
class Nesting {
 public:
  explicit Nesting(const std::string& name) {
    if (depth == kMost) {
      throw std::runtime_error(message("subgraph '", name,
                                       "' stands inside the portable graphs of ", kMost,
                                       " others, one in the other: the file is damaged, or "
                                       "meant to do harm"));
    }
    ++depth;
  }
  ~Nesting() { --depth; }
  Nesting(const Nesting&) = delete;
  Nesting& operator=(const Nesting&) = delete;

 private:
  static constexpr int kMost = 16;
  static thread_local int depth;
};

thread_local int Nesting::depth = 0;

torch::jit::Module read_graph(const Executable& executable, const at::Tensor& graph) {
  const Nesting nesting(executable.name);
  try {
    auto module = torch::jit::load(std::make_shared<TensorReader>(graph));
    module.eval();
    return module;
  } catch (const c10::Error& error) {
    throw std::runtime_error(message("the portable graph of subgraph '", executable.name,
                                     "' cannot be read: ", error.what_without_backtrace()));
  }
}

/// The module of the executable's graph; one for all executables that share the graph's bytes,
/// since reading them copies the weights in them.
std::shared_ptr<const torch::jit::Module> shared_module(const Executable& executable) {
  struct Read {
    at::Tensor graph;  // kept, so that its address names it
    torch::jit::Module module;
  };
  static Mutex mutex;
  static auto& modules = *new std::map<const void*, std::weak_ptr<const Read>>();

  const at::Tensor graph = executable.graph->bytes();
  const void* key = graph.const_data_ptr();
  std::shared_ptr<const Read> read;
  {
    MutexLock lock(mutex);
    std::erase_if(modules, [](const auto& entry) { return entry.second.expired(); });
    const auto found = modules.find(key);
    if (found != modules.end()) read = found->second.lock();
  }
  if (read == nullptr) {
    read = std::make_shared<const Read>(Read{graph, read_graph(executable, graph)});
    MutexLock lock(mutex);
    modules.insert_or_assign(key, read);
  }
  return {read, &read->module};
}

}  // namespace

class TorchScriptReplica final : public Replica {
 public:
  TorchScriptReplica(std::shared_ptr<const TorchScriptProgram> program, int32_t intra_op_threads)
      : program_(std::move(program)),
        forward_(program_->module_->get_method("forward")),
        intra_op_threads_(intra_op_threads) {}

  Tensors execute(TensorRefs inputs) override {
    const CoreScope scope(intra_op_threads_);
    std::vector<c10::IValue> arguments(inputs.begin(), inputs.end());
    const c10::IValue result = forward_(std::move(arguments));
    Tensors outputs;
    if (result.isTensor()) {
      outputs.push_back(result.toTensor());
    } else if (result.isTensorList()) {
      for (const at::Tensor& tensor : result.toTensorVector()) outputs.push_back(tensor);
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
    : executable_(std::move(executable)), module_(shared_module(*executable_)) {}

std::shared_ptr<TorchScriptProgram> TorchScriptProgram::load(
    std::shared_ptr<const Executable> executable) {
  check_integrity(*executable, Format::kTorchScript);
  return std::shared_ptr<TorchScriptProgram>(new TorchScriptProgram(std::move(executable)));
}

std::unique_ptr<Replica> TorchScriptProgram::make_replica(int32_t intra_op_threads) {
  return std::make_unique<TorchScriptReplica>(shared_from_this(), intra_op_threads);
}

}  // namespace neuron::runtime::host
