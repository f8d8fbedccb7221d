// Feeds broken and hostile states and archives to the decoder and to `torch::jit::load`.
//
//   state_fuzzer [--seed N] [--states N] [--archives N] [--only kind:number] [--replay folder]
//                [--keep folder] [file or folder...]
//
// The files are archives to begin with: each must load as it is. Every input must end in success or
// in an exception with a text; what can be decoded must come out again when it is encoded; no
// native code may be mapped out of states whose checks do not pass. Files to replay must be
// refused.
//
// --keep writes the shortest archive of each kind of error, to be replayed later. With
// NEURON_FUZZ_SHOW_ERRORS the kinds are listed; NEURON_FUZZ_DUMP names a file that gets each
// archive before it is loaded.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <neuron_ext/runtime.h>
#include <torch/script.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "archives.h"
#include "corpus.h"
#include "dice.h"
#include "spies.h"
#include "states.h"
#include "subgraph/find_subgraphs.h"
#include "subgraph/neuron_subgraph.h"

namespace neuron::fuzz {
namespace {

using subgraph::Origin;
using subgraph::State;

struct Options {
  uint64_t seed = 1;
  uint64_t states = 1000;
  uint64_t archives = 1000;
  std::string only_kind;
  uint64_t only_number = 0;
  std::filesystem::path replay;
  std::filesystem::path keep;
  std::vector<std::filesystem::path> files;
};

struct Counts {
  uint64_t accepted = 0;
  uint64_t refused = 0;
  std::map<std::string, uint64_t> why;  ///< by `kind_of`
  size_t largest_decode = 0;            ///< the most that one decoding asked for at once, in bytes
};

/// What must never be.
[[noreturn]] void fail(const std::string& what) {
  std::cerr << "\nstate_fuzzer: " << what << std::endl;
  tell_where();
  std::_Exit(EXIT_FAILURE);
}

/// Runs `input`, and returns the kind of its error, or nothing; an exception must have a text.
template <typename Input>
std::optional<std::string> refusal(Counts& counts, Input input) {
  std::string text;
  try {
    input();
    ++counts.accepted;
    return std::nullopt;
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  } catch (const std::exception& error) {
    text = error.what();
  } catch (...) {
    fail("something was thrown that is no exception");
  }
  if (text.empty()) fail("an exception without a text");
  ++counts.refused;
  std::string kind = kind_of(text);
  ++counts.why[kind];
  return kind;
}

/// Loads all subgraphs of what was read, if that did not happen yet, and computes once on each.
void use(const c10::IValue& module) {
  constexpr int64_t kMostElements = 1 << 16;
  for (const auto& handle : subgraph::find_subgraphs(module)) {
    runtime::Tensors inputs;
    bool small = true;
    for (const auto& spec : handle->get()->executable().inputs) {
      int64_t elements = 1;
      for (const int64_t size : spec.shape) elements *= std::min(size, kMostElements + 1);
      small = small && spec.shape.size() < 4 && elements <= kMostElements;
      if (small) inputs.push_back(at::zeros(spec.shape, spec.dtype));
    }
    if (!small) continue;
    static_cast<void>(handle->get()->forward(inputs));
  }
}

constexpr size_t kMostOfADecode = size_t{32} << 20;

void try_state(const std::vector<Base>& bases, Dice& dice, Counts& counts) {
  const Base& base = dice.of(bases);
  State state = copy_of(base.state);
  if (!dice.one_in(100)) mutate(state, dice);
  const Origin origin = dice.one_in(8) ? Origin::kTrace : Origin::kFile;
  forget_allocations();
  const auto refused = refusal(counts, [&] {
    if (!dice.one_in(6)) mend_digests(state, !dice.one_in(3));
    const auto once = decode(state, origin);
    const State again = encode(*once.executable, once.wishes);
    if (const std::string field = difference(state, again); !field.empty()) {
      fail("field '" + field + "' of " + base.name + " changed between decoding and encoding");
    }
    const auto twice = decode(again, Origin::kFile);
    const State same = encode(*twice.executable, twice.wishes);
    const std::string digest = std::get<2>(again).at("sha256_state");
    if (std::get<2>(same).at("sha256_state") != digest) {
      fail("a state of " + base.name + " is not the same when it is encoded twice");
    }
  });
  if (largest_allocation() > kMostOfADecode) {
    fail("a state took " + std::to_string(largest_allocation()) + " bytes at once");
  }
  counts.largest_decode = std::max(counts.largest_decode, largest_allocation());
  if (refused || !dice.one_in(4)) return;
  Counts of_loads;
  refusal(of_loads, [&] { use(c10::IValue(subgraph::NeuronSubgraph::from_file(state))); });
}

torch::jit::Module load(const std::string& archive) {
  std::istringstream in(archive);
  return torch::jit::load(in);
}

void load_and_use(const std::string& archive) {
  const torch::jit::Module module = load(archive);
  use(module._ivalue());
}

void try_archive(const std::vector<Base>& bases, const std::vector<std::string>& corpus, Dice& dice,
                 Counts& counts, Keeper& keeper) {
  std::string archive;
  if (dice.one_in(2)) {
    archive = mutated(dice.of(corpus), dice.of(corpus), dice);
  } else {
    State state = copy_of(dice.of(bases).state);
    Counts not_counted;  // what cannot be saved is no input
    const auto unsaved = refusal(not_counted, [&] {
      mutate(state, dice);
      if (!dice.one_in(6)) mend_digests(state, !dice.one_in(3));
      archive = archive_with(state);
    });
    if (unsaved) archive = dice.of(corpus);
  }
  if (const char* path = std::getenv("NEURON_FUZZ_DUMP")) {
    std::ofstream(path, std::ios::binary) << archive;
  }
  const auto kind = refusal(counts, [&] { load_and_use(archive); });
  if (kind) keeper.offer(*kind, archive);
}

void replay(const File& file, Counts& counts) {
  if (!refusal(counts, [&] { load_and_use(file.data); })) fail(file.name + " was accepted");
}

void check_mappings(size_t before) {
  if (carried_code_ran()) fail("native code ran that must not be mapped");
  if (executable_mappings() > before) fail("something was mapped executable");
}

/// Tries `number` inputs, by `one(number of the input, dice, counts)`.
template <typename Try>
Counts run(const char* kind, uint64_t number, const Options& options, Try one) {
  Counts counts;
  if (number == 0 || (!options.only_kind.empty() && options.only_kind != kind)) return counts;
  const auto start = std::chrono::steady_clock::now();
  const size_t mappings = executable_mappings();
  const uint64_t refused = refused_allocations();
  for (uint64_t i = 0; i < number; ++i) {
    if (!options.only_kind.empty() && i != options.only_number) continue;
    now_at(kind, i);
    Dice dice(options.seed, i);
    one(i, dice, counts);
    check_mappings(mappings);
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf(
      "%-8s %8llu inputs: %8llu refused, %7llu accepted, in %5.0f s; "
      "%llu kinds of error, %llu huge allocations refused, %zu MB resident\n",
      kind, static_cast<unsigned long long>(counts.accepted + counts.refused),
      static_cast<unsigned long long>(counts.refused),
      static_cast<unsigned long long>(counts.accepted), seconds.count(),
      static_cast<unsigned long long>(counts.why.size()),
      static_cast<unsigned long long>(refused_allocations() - refused), resident_memory() >> 20);
  std::fflush(stdout);
  if (std::getenv("NEURON_FUZZ_SHOW_ERRORS") != nullptr) {
    for (const auto& [text, times] : counts.why) {
      std::cout << times << "\t" << text << std::endl;
    }
  }
  return counts;
}

/// The native code of a state is mapped when nothing forbids it, and only then: the spies see it.
void check_spies(const at::Tensor& library) {
  const State state = loadable_native_state(library);
  const size_t before = executable_mappings();
  Counts counts;
  ::setenv("NEURON_EXT_NATIVE_CODE", "deny", 1);
  const auto load_it = [&] { subgraph::NeuronSubgraph::from_file(state); };
  if (!refusal(counts, load_it)) fail("a native state was loaded where native code is denied");
  check_mappings(before);
  ::unsetenv("NEURON_EXT_NATIVE_CODE");
  if (!refusal(counts, load_it)) fail("a library without functions was accepted");
  if (executable_mappings() <= before || !carried_code_ran()) {
    fail("the spies do not see native code that is mapped");
  }
}

/// A subgraph whose portable graph holds a subgraph, and so on: not without end.
void check_nesting(const State& portable) {
  constexpr int kFine = 4;
  constexpr int kTooDeep = 40;
  State state = copy_of(portable);
  for (int depth = 1; depth <= kTooDeep; ++depth) {
    const std::string archive = archive_with(state);
    if (depth == kFine || depth == kTooDeep) {
      Counts counts;
      const bool refused = refusal(counts, [&] { load(archive); }).has_value();
      if (refused != (depth == kTooDeep)) fail("nested graphs are not limited as they should be");
    }
    std::get<5>(state).insert_or_assign(
        "graph", at::from_blob(const_cast<char*>(archive.data()),
                               {static_cast<int64_t>(archive.size())}, at::kByte)
                     .clone());
    mend_digests(state, true);
  }
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i];
    if (word.rfind("--", 0) != 0) {
      options.files.emplace_back(word);
      continue;
    }
    if (++i == count) throw std::invalid_argument(word + " needs a value");
    const std::string value = arguments[i];
    if (word == "--seed") {
      options.seed = std::stoull(value);
    } else if (word == "--states") {
      options.states = std::stoull(value);
    } else if (word == "--archives") {
      options.archives = std::stoull(value);
    } else if (word == "--replay") {
      options.replay = value;
    } else if (word == "--keep") {
      options.keep = value;
    } else if (word == "--only") {
      const auto colon = value.find(':');
      if (colon == std::string::npos) throw std::invalid_argument("--only takes kind:number");
      options.only_kind = value.substr(0, colon);
      options.only_number = std::stoull(value.substr(colon + 1));
      options.states = options.archives = options.only_number + 1;
    } else {
      throw std::invalid_argument("no such option: " + word);
    }
  }
  return options;
}

int fuzz(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  ::setenv("NEURON_EXT_HOST_CORES", "4", 1);
  ::setenv("NEURON_RT_LOG_LEVEL", "quiet", 1);  // fall backs are warned of
  install_spies(options.seed);
  const std::string file = read_files(NEURON_FUZZ_CARRIED_LIBRARY).front().data;
  const at::Tensor library =
      at::from_blob(const_cast<char*>(file.data()), {static_cast<int64_t>(file.size())}, at::kByte)
          .clone();
  const std::vector<Base> bases = base_states(library);
  std::vector<std::string> corpus;
  for (const auto& path : options.files) {
    for (File& archive : read_files(path)) corpus.push_back(std::move(archive.data));
  }
  for (const Base& base : bases) {
    if (base.name == "portable") corpus.push_back(archive_with(base.state));
  }
  now_at("corpus", 0);
  for (const std::string& archive : corpus) {
    load_and_use(archive);
    load_and_use(archive_of(records_of(archive)));
  }
  const auto kept = options.replay.empty() ? std::vector<File>{} : read_files(options.replay);
  run("kept", kept.size(), options,
      [&](uint64_t i, Dice&, Counts& counts) { replay(kept[i], counts); });
  const Counts states =
      run("state", options.states, options,
          [&](uint64_t, Dice& dice, Counts& counts) { try_state(bases, dice, counts); });
  Keeper keeper;
  const Counts archives =
      run("archive", options.archives, options, [&](uint64_t, Dice& dice, Counts& counts) {
        try_archive(bases, corpus, dice, counts, keeper);
      });
  if (!options.keep.empty()) keeper.write(options.keep);
  now_at("nesting", 0);
  check_nesting(bases.front().state);
  now_at("spies", 0);
  check_spies(library);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf(
      "fuzzer: %llu states, %llu archives and %zu kept files, seed %llu, in %.0f s: all accepted "
      "or "
      "refused with an error, nothing mapped; at most %zu KB at once in a decoding, %zu MB "
      "resident\n",
      static_cast<unsigned long long>(states.accepted + states.refused),
      static_cast<unsigned long long>(archives.accepted + archives.refused), kept.size(),
      static_cast<unsigned long long>(options.seed), seconds.count(), states.largest_decode >> 10,
      most_resident_memory() >> 20);
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace neuron::fuzz

int main(int count, char** arguments) {
  try {
    return neuron::fuzz::fuzz(neuron::fuzz::parse(count, arguments));
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::cerr << "state_fuzzer: " << text.substr(0, text.find("\nframe #")) << '\n';
    return EXIT_FAILURE;
  }
}
