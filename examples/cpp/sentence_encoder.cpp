// Encodes the sentences that examples/python/sentence_encoder.py saved, from several threads and
// without Python, while the model moves from core to core. The embeddings must be those of Python.
//
// Usage: sentence_encoder [folder that the Python example wrote, default demo_output]
#include <neuron_ext/placement.h>
#include <neuron_ext/runtime.h>
#include <torch/script.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace fs = std::filesystem;

constexpr int64_t kThreads = 4;
constexpr int64_t kRounds = 4;
constexpr double kTolerance = 1e-5;

std::ifstream open_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path.string() +
                             ": run examples/python/sentence_encoder.py first, or pass its --out");
  }
  return file;
}

// Reads what torch.save wrote.
torch::IValue read_pickle(const fs::path& path) {
  std::ifstream file = open_file(path);
  return torch::jit::pickle_load({std::istreambuf_iterator<char>(file), {}});
}

struct Sentences {
  explicit Sentences(const fs::path& folder)
      : embeddings(read_pickle(folder / "embeddings.pt").toTensor()) {
    const auto tokens = read_pickle(folder / "tokens.pt").toGenericDict();
    ids = tokens.at("input_ids").toTensor();
    mask = tokens.at("attention_mask").toTensor();
    std::ifstream file = open_file(folder / "sentences.txt");
    for (std::string line; std::getline(file, line);) text.push_back(line);
  }

  int64_t size() const { return static_cast<int64_t>(text.size()); }

  std::vector<std::string> text;
  torch::Tensor ids;
  torch::Tensor mask;
  torch::Tensor embeddings;  // as Python computed them
};

torch::Tensor encode(torch::jit::Module model, const Sentences& sentences, int64_t i) {
  return model.forward({sentences.ids.narrow(0, i, 1), sentences.mask.narrow(0, i, 1)}).toTensor();
}

std::string cores_of(const torch::jit::Module& model) {
  const neuron::SubgraphStatus status = neuron::status(model).at(0);
  std::string text;
  for (const int64_t core : status.cores) text += " " + std::to_string(core);
  return text;
}

// Every sentence kRounds times, from kThreads threads, while this thread moves the model around.
torch::Tensor encode_while_moving(torch::jit::Module model, const Sentences& sentences) {
  std::vector<torch::Tensor> results(kRounds * sentences.size());
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t i; (i = next++) < results.size();) {
      results[i] = encode(model, sentences, static_cast<int64_t>(i) % sentences.size());
    }
  };
  std::vector<std::future<void>> threads;
  for (int i = 0; i < kThreads; ++i) threads.push_back(std::async(std::launch::async, work));

  for (int32_t core = 0; core < neuron::visible_core_count(); ++core) {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    neuron::set_neuron_cores(model, core);
    neuron::wait(model);  // the model was saved with the async flag: it moves in the background
    std::printf("  moved to core%s\n", cores_of(model).c_str());
  }
  for (auto& thread : threads) thread.get();
  return torch::cat(results);
}

// One sentence after another; tells which core each ran on by the execution counts.
torch::Tensor encode_and_tell(torch::jit::Module model, const Sentences& sentences) {
  std::vector<torch::Tensor> results;
  std::vector<int64_t> core_of;
  for (int64_t i = 0; i < sentences.size(); ++i) {
    const neuron::SubgraphStatus before = neuron::status(model).at(0);
    results.push_back(encode(model, sentences, i));
    const neuron::SubgraphStatus after = neuron::status(model).at(0);
    for (size_t k = 0; k < after.cores.size(); ++k) {
      if (after.executions[k] > before.executions[k]) core_of.push_back(after.cores[k]);
    }
  }
  const torch::Tensor embeddings = torch::cat(results);
  const torch::Tensor others = embeddings.mm(embeddings.t()).fill_diagonal_(-1);  // not itself
  const auto [similarity, closest] = others.max(1);
  for (int64_t i = 0; i < sentences.size(); ++i) {
    std::printf("  %2d  core %d  closest: %2d (%.2f)  %s\n", int(i + 1), int(core_of.at(i)),
                closest[i].item<int>() + 1, similarity[i].item<double>(),
                sentences.text[i].c_str());
  }
  return embeddings;
}

bool same(const torch::Tensor& embeddings, const torch::Tensor& expected) {
  const double difference = (embeddings - expected).abs().max().item<double>();
  std::printf("  largest difference from Python: %.1e (allowed: %.0e)\n", difference, kTolerance);
  return difference <= kTolerance;
}

bool run(const fs::path& folder) {
  const Sentences sentences(folder);
  const int32_t cores = neuron::visible_core_count();

  torch::jit::Module model;
  {
    const neuron::NeuronCoresGuard guard(cores - 1);
    model = torch::jit::load((folder / "encoder.pt").string());
  }
  neuron::wait(model);  // the model was saved with the lazy flag
  std::printf("1. Loaded onto core%s of %d cores\n", cores_of(model).c_str(), cores);

  std::printf("2. %d sentences, %d times, from %d threads, on a model that moves\n",
              int(sentences.size()), int(kRounds), int(kThreads));
  bool ok = same(encode_while_moving(model, sentences), sentences.embeddings.repeat({kRounds, 1}));
  for (const neuron::CoreStats& core : neuron::core_stats()) {
    std::printf("  core %d: %d executions\n", core.index, int(core.executions));
  }

  neuron::set_multicore(model);
  neuron::wait(model);
  std::printf("3. Replicated onto core%s; one sentence after another\n", cores_of(model).c_str());
  ok &= same(encode_and_tell(model, sentences), sentences.embeddings);
  return ok;
}

}  // namespace

int main(int argc, char** argv) try {
  if (run(argc > 1 ? argv[1] : "demo_output")) return 0;
  std::fprintf(stderr, "sentence_encoder: the embeddings are not those of Python\n");
  return 1;
} catch (const c10::Error& error) {
  std::fprintf(stderr, "sentence_encoder: %s\n", error.what_without_backtrace());
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "sentence_encoder: %s\n", error.what());
  return 1;
}
