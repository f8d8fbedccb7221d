// Runs a traced model of two vectors, for example one made by
//   traced = neuron_ext.trace(lambda x, y: 2 * x + y, (torch.ones(3), torch.ones(3)))
//   torch.jit.save(traced, "model.pt")
// Usage: run_model model.pt
#include <neuron_ext/runtime.h>
#include <torch/script.h>

#include <exception>
#include <iostream>

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::cerr << "usage: run_model <model.pt>\n";
    return 2;
  }
  torch::jit::Module model = torch::jit::load(argv[1]);
  const torch::Tensor x = torch::ones(3);
  const torch::Tensor y = torch::ones(3);
  std::cout << model.forward({x, y}).toTensor() << '\n';
  for (const neuron::SubgraphStatus& subgraph : neuron::status(model)) {
    std::cout << subgraph.name << " ran on core " << subgraph.cores.at(0) << '\n';
  }
  return 0;
} catch (const c10::Error& error) {
  std::cerr << "run_model: " << error.what_without_backtrace() << '\n';
  return 1;
} catch (const std::exception& error) {
  std::cerr << "run_model: " << error.what() << '\n';
  return 1;
}
