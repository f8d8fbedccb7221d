#include "runtime/host/inductor_program.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_runtime/interface.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/message.h"
#include "runtime/host/integrity.h"
#include "runtime/host/kept_memory.h"
#include "runtime/host/native_library.h"
#include "runtime/host/thread_settings.h"

// The thin C interface of the generated code is used, not torch's runner classes: those copy the
// weights, and queue callers in a way that can strand one when another's call throws.
namespace neuron::runtime::host {
namespace {

using torch::aot_inductor::new_tensor_handle;
using torch::aot_inductor::tensor_handle_to_tensor_pointer;

/// The functions of one mapped library.
struct Api {
  decltype(&AOTInductorModelContainerCreateWithDevice) create;
  decltype(&AOTInductorModelContainerDelete) destroy;
  decltype(&AOTInductorModelContainerRunSingleThreaded) run;
  decltype(&AOTInductorModelContainerUpdateUserManagedConstantBufferPairs) set_constants;
  decltype(&AOTInductorModelContainerGetNumInputs) num_inputs;
  decltype(&AOTInductorModelContainerGetNumOutputs) num_outputs;
  decltype(&AOTInductorModelContainerGetNumConstants) num_constants;
  decltype(&AOTInductorModelContainerGetConstantName) constant_name;
  decltype(&AOTInductorGetLastError) last_error;
};

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (function == nullptr) {
    throw std::runtime_error(message("the native code has no function ", name,
                                     ": it was made by another version of torch; trace again"));
  }
}

Api find_api(void* library) {
  Api api{};
  find(library, "AOTInductorModelContainerCreateWithDevice", api.create);
  find(library, "AOTInductorModelContainerDelete", api.destroy);
  find(library, "AOTInductorModelContainerRunSingleThreaded", api.run);
  find(library, "AOTInductorModelContainerUpdateUserManagedConstantBufferPairs", api.set_constants);
  find(library, "AOTInductorModelContainerGetNumInputs", api.num_inputs);
  find(library, "AOTInductorModelContainerGetNumOutputs", api.num_outputs);
  find(library, "AOTInductorModelContainerGetNumConstants", api.num_constants);
  find(library, "AOTInductorModelContainerGetConstantName", api.constant_name);
  find(library, "AOTInductorGetLastError", api.last_error);
  return api;
}

void check(const Api& api, AOTIRuntimeError error, const char* what) {
  if (error == AOTI_RUNTIME_SUCCESS) return;
  const char* reason = nullptr;
  api.last_error(&reason);
  throw std::runtime_error(message("native code failed while ", what, ": ",
                                   reason != nullptr ? reason : "no reason given"));
}

/// A tensor over `constant`'s bytes of `weights`.
at::Tensor make_constant(const at::Tensor& weights, const ConstantSpec& constant) {
  auto* data = static_cast<uint8_t*>(weights.mutable_data_ptr()) + constant.offset;
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_create_tensor_from_blob_v2(
      data, static_cast<int64_t>(constant.shape.size()), constant.shape.data(),
      constant.strides.data(), /*storage_offset=*/0, static_cast<int32_t>(constant.dtype),
      aoti_torch_device_type_cpu(), /*device_index=*/0, &handle,
      static_cast<int32_t>(constant.layout), constant.opaque.data(),
      static_cast<int64_t>(constant.opaque.size()));
  if (error != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(message("constant '", constant.name,
                                     "' of the subgraph cannot be made out of its weights"));
  }
  at::Tensor tensor = std::move(*tensor_handle_to_tensor_pointer(handle));
  aoti_torch_delete_tensor_object(handle);
  return tensor;
}

/// Containers take most of the time of a load that finds everything else in place: they hash the
/// names of all constants. One that a replica gave up is kept for the next, so that moves make
/// none.
class IdleContainer {
 public:
  explicit IdleContainer(const Api& api) : api_(api) {}
  ~IdleContainer() { put(nullptr); }
  IdleContainer(const IdleContainer&) = delete;
  IdleContainer& operator=(const IdleContainer&) = delete;

  /// The one kept here, or null. Whoever takes it owns it.
  AOTInductorModelContainerHandle take() { return idle_.exchange(nullptr); }

  /// Keeps `container` and destroys the one kept so far, if any.
  void put(AOTInductorModelContainerHandle container) {
    if (const auto before = idle_.exchange(container)) api_.destroy(before);
  }

 private:
  const Api api_;
  std::atomic<AOTInductorModelContainerHandle> idle_{nullptr};
};

class Program final : public InductorProgram {
 public:
  explicit Program(std::shared_ptr<const Executable> executable)
      : executable_(std::move(executable)),
        api_(find_api(map_native_library(executable_->code->bytes(), executable_->code->sha256()))),
        weights_(executable_->weights != nullptr ? executable_->weights->bytes() : at::Tensor()),
        idle_(api_) {
    for (const auto& constant : executable_->constants) {
      constants_.push_back(make_constant(weights_, constant));
    }
    keep_freed_memory();
  }

  std::unique_ptr<Replica> make_replica(int32_t intra_op_threads) override;

  const Executable& executable() const { return *executable_; }
  const Api& api() const { return api_; }
  const std::vector<at::Tensor>& constants() const { return constants_; }
  IdleContainer& idle() const { return idle_; }

  /// Whether the tensor's bytes are the weights': a model that returns a parameter of its own.
  bool is_weight(const at::Tensor& tensor) const {
    if (!weights_.defined()) return false;
    const auto* begin = static_cast<const uint8_t*>(weights_.const_data_ptr());
    const auto* data = static_cast<const uint8_t*>(tensor.const_data_ptr());
    return data >= begin && data < begin + weights_.numel();
  }

 private:
  const std::shared_ptr<const Executable> executable_;
  const Api api_;
  const at::Tensor weights_;
  std::vector<at::Tensor> constants_;
  mutable IdleContainer idle_;  // after the constants, which containers borrow
};

class InductorReplica final : public Replica {
 public:
  InductorReplica(std::shared_ptr<const Program> program, int32_t intra_op_threads)
      : program_(std::move(program)), intra_op_threads_(intra_op_threads) {
    container_ = program_->idle().take();
    if (container_ != nullptr) return;
    const CoreScope scope(intra_op_threads_);
    check(api(), api().create(&container_, /*num_models=*/1, "cpu", /*cubin_dir=*/nullptr),
          "it was set up");
    try {
      check_signature();
      set_constants();
    } catch (...) {
      api().destroy(container_);
      throw;
    }
  }
  ~InductorReplica() override {
    if (sound_) {
      program_->idle().put(container_);
    } else {
      api().destroy(container_);
    }
  }
  InductorReplica(const InductorReplica&) = delete;
  InductorReplica& operator=(const InductorReplica&) = delete;

  Tensors execute(TensorRefs inputs) override {
    const CoreScope scope(intra_op_threads_);
    // The code takes over the input handles, also when it fails; a handle of ours is one more
    // reference to the tensor.
    c10::SmallVector<AtenTensorHandle, 8> in;
    for (const auto& input : inputs) in.push_back(new_tensor_handle(at::Tensor(input)));
    c10::SmallVector<AtenTensorHandle, 8> out(program_->executable().outputs.size(), nullptr);
    sound_ = false;
    check(api(),
          api().run(container_, in.data(), in.size(), out.data(), out.size(), /*stream=*/nullptr,
                    /*proxy_executor=*/nullptr),
          "it computed");
    sound_ = true;
    Tensors outputs;
    outputs.reserve(out.size());
    for (AtenTensorHandle handle : out) {
      outputs.push_back(std::move(*tensor_handle_to_tensor_pointer(handle)));
      aoti_torch_delete_tensor_object(handle);
      // The caller may write to what it gets, and keep it longer than the module.
      if (program_->is_weight(outputs.back())) outputs.back() = outputs.back().clone();
    }
    return outputs;
  }

 private:
  const Api& api() const { return program_->api(); }

  void check_signature() const {
    size_t inputs = 0;
    size_t outputs = 0;
    size_t constants = 0;
    api().num_inputs(container_, &inputs);
    api().num_outputs(container_, &outputs);
    api().num_constants(container_, &constants);
    const Executable& executable = program_->executable();
    if (inputs != executable.inputs.size() || outputs != executable.outputs.size() ||
        constants != executable.constants.size()) {
      throw std::runtime_error(
          message("the native code takes ", inputs, " inputs, ", constants, " constants and gives ",
                  outputs, " outputs, but the subgraph's specification says ",
                  executable.inputs.size(), ", ", executable.constants.size(), " and ",
                  executable.outputs.size(), ": the file is damaged"));
    }
    // Set by name: one that the code does not know would leave another unset.
    for (size_t i = 0; i < constants; ++i) {
      const char* name = nullptr;
      api().constant_name(container_, i, &name);
      if (name == nullptr || executable.constants[i].name != name) {
        throw std::runtime_error(message("constant ", i, " of the native code is '",
                                         name != nullptr ? name : "", "', but the subgraph's is '",
                                         executable.constants[i].name, "': the file is damaged"));
      }
    }
  }

  void set_constants() {
    const Executable& executable = program_->executable();
    std::vector<AOTInductorConstantMapEntry> entries;
    for (size_t i = 0; i < executable.constants.size(); ++i) {
      // The container borrows the tensors; the program keeps them.
      entries.push_back(
          {executable.constants[i].name.c_str(),
           reinterpret_cast<AtenTensorHandle>(const_cast<at::Tensor*>(&program_->constants()[i]))});
    }
    if (entries.empty()) return;
    check(api(),
          api().set_constants(container_, entries.data(), entries.size(), /*use_inactive=*/false,
                              /*validate_full_update=*/true),
          "it took its constants");
  }

  const std::shared_ptr<const Program> program_;
  const int32_t intra_op_threads_;
  AOTInductorModelContainerHandle container_ = nullptr;
  bool sound_ = true;  ///< the last inference did not fail
};

std::unique_ptr<Replica> Program::make_replica(int32_t intra_op_threads) {
  return std::make_unique<InductorReplica>(
      std::static_pointer_cast<const Program>(shared_from_this()), intra_op_threads);
}

}  // namespace

std::shared_ptr<InductorProgram> InductorProgram::load(
    std::shared_ptr<const Executable> executable) {
  check_integrity(*executable, Format::kInductor);
  return std::make_shared<Program>(std::move(executable));
}

}  // namespace neuron::runtime::host
