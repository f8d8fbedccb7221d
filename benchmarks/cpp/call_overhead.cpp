// What a call costs from C++: the loaded module, the same module around a no-op, the op by itself,
// and AOTInductor's runner on the same native code. Prints microseconds per call, round by round.
//
//   call_overhead LIBRARY NOOP_LIBRARY MODULE.pt NOOP.pt MODEL.so ROUNDS CALLS
//
// LIBRARY is libneuron_ext.so; the modules take two float tensors of 3 elements.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/script.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace {

using Call = std::function<at::Tensor()>;

void load_library(const char* path) {
  if (::dlopen(path, RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", ::dlerror());
    std::exit(1);
  }
}

double microseconds_per_call(const Call& call, int calls) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) call();
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  return took.count() / calls;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "7 arguments are needed, see the source\n");
    return 2;
  }
  load_library(argv[1]);
  load_library(argv[2]);
  const int rounds = std::atoi(argv[6]);
  const int calls = std::atoi(argv[7]);

  const at::Tensor x = torch::ones({3});
  const at::Tensor y = torch::full({3}, 5.0F);
  torch::jit::Module module = torch::jit::load(argv[3]);
  torch::jit::Module noop = torch::jit::load(argv[4]);
  torch::inductor::AOTIModelContainerRunnerCpu runner(argv[5]);
  const c10::OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow("neuron_ext::forward", "");
  const c10::IValue subgraph = module.attr("subgraph");

  const std::vector<std::pair<std::string, Call>> subjects = {
      {"neuron_ext, loaded", [&] { return module.forward({x, y}).toTensor(); }},
      {"no-op module", [&] { return noop.forward({x, y}).toTensor(); }},
      {"neuron_ext, op alone",
       [&] {
         torch::jit::Stack stack{c10::List<at::Tensor>({x, y}), subgraph};
         op.callBoxed(stack);
         return stack[0].toTensorList().get(0);
       }},
      {"C++ runner", [&] { return runner.run({x, y})[0]; }},
  };
  for (const auto& [name, call] : subjects) {
    const at::Tensor expected = name == "no-op module" ? x : 2 * x + y;
    if (!at::equal(call(), expected)) {
      std::fprintf(stderr, "%s gives a wrong answer\n", name.c_str());
      return 1;
    }
    microseconds_per_call(call, calls);  // TorchScript optimises within the first calls
  }

  std::vector<std::vector<double>> values(subjects.size());
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < subjects.size(); ++i) {
      const size_t which = (i + round) % subjects.size();
      values[which].push_back(microseconds_per_call(subjects[which].second, calls));
    }
  }
  std::printf("{");
  for (size_t i = 0; i < subjects.size(); ++i) {
    std::printf("%s\"%s\": [", i == 0 ? "" : ", ", subjects[i].first.c_str());
    for (int round = 0; round < rounds; ++round) {
      std::printf("%s%.6f", round == 0 ? "" : ", ", values[i][round]);
    }
    std::printf("]");
  }
  std::printf("}\n");
  return 0;
}
