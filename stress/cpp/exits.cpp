// Ends at a random moment, in some way, while threads make requests, move the module and load it.
// Usage: exits <native.pt> return|exit|exception|sigterm <seed>
#include <neuron_ext/placement.h>
#include <neuron_ext/runtime.h>
#include <torch/script.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

namespace {

void check(const torch::Tensor& answer, const torch::Tensor& expected) {
  if (!torch::equal(answer, expected)) {
    std::cerr << "WRONG " << answer << '\n';
    std::_Exit(99);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: exits <native.pt> return|exit|exception|sigterm <seed>\n";
    return 2;
  }
  const std::string file = argv[1];
  const std::string way = argv[2];
  std::mt19937 random(static_cast<unsigned>(std::atoi(argv[3])));
  // An exception that nobody catches ends a C++ program by abort; this one has a handler of its
  // own.
  std::set_terminate([] { std::_Exit(4); });

  torch::jit::Module model = torch::jit::load(file);
  neuron::set_multicore(model);
  const torch::Tensor x = torch::arange(6.0).reshape({2, 3});
  const torch::Tensor expected = model.forward({x}).toTensor();
  std::atomic<int> started{0};
  const auto repeat = [&started](auto body) {
    std::thread([&started, body]() mutable {
      body();
      ++started;
      while (true) body();
    }).detach();
  };
  for (int i = 0; i < 3; ++i) {
    repeat([model, x, expected]() mutable { check(model.forward({x}).toTensor(), expected); });
  }
  repeat([model]() mutable { neuron::set_neuron_cores(model, -1, 2); });
  repeat([file] {
    torch::jit::Module loaded = torch::jit::load(file);
    neuron::async_load(loaded);
    neuron::set_multicore(loaded);
  });
  while (started < 5) std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 100000));
  if (way == "exit") std::exit(3);
  if (way == "exception") throw std::runtime_error("on purpose");
  if (way == "sigterm") std::raise(SIGTERM);
  return 0;  // each thread has copies of what it uses, but for the counter, with which it is done
}
