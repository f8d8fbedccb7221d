// Serves an AOTInductor package with threads of its own, as told line by line on stdin, and answers
// in JSON, one line each.
//
//   package_runner MODEL.pt2 THREADS INPUT...
//
// An INPUT is DTYPE:SIZE,SIZE,...:FILE with the raw values; DTYPE is float32 or int64.
//
//   answer                     -> the values of the first output
//   throughput SECONDS FEWEST  -> when calls completed, in seconds; waits for FEWEST of them
//   latencies TIME TIME ...    -> seconds from each arrival to its answer; the times are in seconds
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

at::Tensor read_input(const std::string& text) {
  std::istringstream stream(text);
  std::string dtype;
  std::string sizes;
  std::string file;
  std::getline(stream, dtype, ':');
  std::getline(stream, sizes, ':');
  std::getline(stream, file);
  std::vector<int64_t> shape;
  std::istringstream numbers(sizes);
  for (std::string number; std::getline(numbers, number, ',');) shape.push_back(std::stoll(number));
  at::Tensor tensor = torch::empty(shape, dtype == "int64" ? torch::kInt64 : torch::kFloat32);
  std::ifstream bytes(file, std::ios::binary);
  bytes.read(static_cast<char*>(tensor.mutable_data_ptr()),
             static_cast<std::streamsize>(tensor.nbytes()));
  if (!bytes) throw std::runtime_error("cannot read the input " + text);
  return tensor;
}

void print(const std::vector<double>& values) {
  std::printf("[");
  for (size_t i = 0; i < values.size(); ++i) std::printf("%s%.9g", i == 0 ? "" : ", ", values[i]);
  std::printf("]\n");
  std::fflush(stdout);
}

class Server {
 public:
  Server(const std::string& package, int threads, std::vector<at::Tensor> inputs)
      : inputs_(std::move(inputs)),
        threads_(threads),
        loader_(package, "model", /*run_single_threaded=*/false, static_cast<size_t>(threads)) {}

  at::Tensor call() { return loader_.run(inputs_).at(0); }

  std::vector<double> throughput(double seconds, int fewest) {
    std::vector<std::vector<double>> completions(threads_);
    std::atomic<int> completed{0};
    run([&](int number, Clock::time_point start) {
      for (;;) {
        call();
        const double now = Seconds(Clock::now() - start).count();
        if (now >= seconds && completed >= fewest) return;
        ++completed;
        completions[number].push_back(now);
      }
    });
    std::vector<double> all;
    for (const auto& mine : completions) all.insert(all.end(), mine.begin(), mine.end());
    return all;
  }

  std::vector<double> latencies(const std::vector<double>& arrivals) {
    std::vector<double> found(arrivals.size());
    std::atomic<size_t> next{0};
    run([&](int, Clock::time_point start) {
      for (size_t number = next++; number < arrivals.size(); number = next++) {
        const auto arrival =
            start + std::chrono::duration_cast<Clock::duration>(Seconds(arrivals[number]));
        std::this_thread::sleep_until(arrival);
        call();
        found[number] = Seconds(Clock::now() - arrival).count();
      }
    });
    return found;
  }

 private:
  /// Runs `work` in all threads, each warm, from one moment on.
  void run(const std::function<void(int, Clock::time_point)>& work) {
    Clock::time_point start;
    std::barrier together(threads_, [&]() noexcept { start = Clock::now(); });
    std::vector<std::jthread> running;
    for (int number = 0; number < threads_; ++number) {
      running.emplace_back([&, number] {
        const c10::InferenceMode inference;
        call();
        together.arrive_and_wait();
        work(number, start);
      });
    }
  }

  const std::vector<at::Tensor> inputs_;
  const int threads_;
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace

int main(int argc, char** argv) {
  std::vector<at::Tensor> inputs;
  for (int i = 3; i < argc; ++i) inputs.push_back(read_input(argv[i]));
  Server server(argv[1], std::stoi(argv[2]), std::move(inputs));
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string what;
    words >> what;
    std::vector<double> numbers;
    for (double number; words >> number;) numbers.push_back(number);
    if (what == "throughput") {
      print(server.throughput(numbers.at(0), static_cast<int>(numbers.at(1))));
    } else if (what == "latencies") {
      print(server.latencies(numbers));
    } else {
      const c10::InferenceMode inference;
      const at::Tensor answer = server.call().contiguous();
      const float* values = answer.const_data_ptr<float>();
      print({values, values + answer.numel()});
    }
  }
  return 0;
}
