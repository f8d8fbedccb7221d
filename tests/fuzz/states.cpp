#include "states.h"

#include <ATen/ATen.h>
#include <c10/core/ScalarType.h>
#include <sys/utsname.h>
#include <torch/script.h>
#include <torch/version.h>

#include <memory>
#include <sstream>
#include <utility>

#include "common/message.h"
#include "common/sha256.h"
#include "runtime/quick_checksum.h"
#include "subgraph/state_digest.h"
#include "subgraph/state_reader.h"

namespace neuron::fuzz {
namespace {

using runtime::Content;
using runtime::ContentPtr;
using runtime::Executable;
using runtime::Format;
using subgraph::State;

ContentPtr content(const at::Tensor& bytes, bool with_checksum = true) {
  const auto digest = sha256_hex(bytes.const_data_ptr(), static_cast<size_t>(bytes.numel()));
  std::optional<int64_t> checksum;
  if (with_checksum) checksum = runtime::quick_checksum(bytes);
  return std::make_shared<Content>(bytes, digest, checksum);
}

at::Tensor archive_of(const std::string& source) {
  torch::jit::Module module("Portable");
  module.define(source);
  std::ostringstream out;
  module.save(out);
  const std::string bytes = out.str();
  return at::from_blob(const_cast<char*>(bytes.data()), {static_cast<int64_t>(bytes.size())},
                       at::kByte)
      .clone();
}

std::string this_arch() {
  utsname names{};
  ::uname(&names);
  return names.machine;
}

Executable portable() {
  Executable executable;
  executable.name = "portable";
  executable.producer = "neuron_ext 0.1.0";
  executable.format = Format::kTorchScript;
  executable.inputs = {{"x", at::kFloat, {2}}};
  executable.outputs = {{"", at::kFloat, {2}}};
  executable.requirements = {"", {}, TORCH_VERSION, "host"};
  executable.graph = content(archive_of("def forward(self, x):\n  return [x + x]\n"));
  return executable;
}

Executable held() {
  Executable executable = portable();
  executable.name = "held";
  executable.inputs = {{"x", at::kFloat, {2}},
                       {"weight", at::kFloat, {2}},
                       {"total", at::kFloat, {2}},
                       {"count", at::kLong, {3}}};
  executable.outputs = {{"", at::kFloat, {2}}, {"", at::kFloat, {2}}, {"", at::kLong, {3}}};
  executable.held_inputs = 3;
  executable.tied_names = {{"inner.weight", 1}, {"inner.other", 1}};
  const at::Tensor initial = at::arange(16, at::kByte);
  executable.aliases = {{2, 1, initial.narrow(0, 0, 8)}, {3, 2, initial.narrow(0, 8, 8)}};
  executable.graph =
      content(archive_of("def forward(self, x, weight, total, count):\n"
                         "  return [x * weight, total + x, count + 1]\n"));
  return executable;
}

Executable native(const at::Tensor& library) {
  Executable executable = portable();
  executable.name = "native";
  executable.format = Format::kInductor;
  executable.graph = nullptr;
  executable.inputs = {{"x", at::kFloat, {2, 3}}, {"y['mask']", at::kBool, {}}};
  executable.outputs = {{"", at::kBFloat16, {0, 7}}};
  executable.mutated_inputs = {1};
  executable.requirements.arch = this_arch();
  executable.code = content(library, false);
  executable.weights = content(at::arange(192, at::kByte));
  executable.constants = {
      {"w", "net.weight", at::kFloat, at::kStrided, 0, 64, {4, 4}, {1, 4}, {}},
      {"p", "p", at::kFloat, at::kMkldnn, 64, 128, {2, 2}, {2, 0}, {1, 2, 3}},
      {"s", "scalar", at::kLong, at::kStrided, 184, 8, {}, {}, {}},
  };
  return executable;
}

bool same_text(const std::string& field, const std::string& one, const std::string& other) {
  if (one == other) return true;
  if (field.find("_dtypes") == std::string::npos) return false;
  const auto& known = c10::getStringToDtypeMap();  // "half" is "float16"
  return known.count(one) == 1 && known.count(other) == 1 && known.at(one) == known.at(other);
}

bool same(const std::string&, int64_t one, int64_t other) {
  return one == other;
}

bool same(const std::string& field, const std::string& one, const std::string& other) {
  return field == subgraph::kDigestField || same_text(field, one, other);
}

bool same(const std::string&, const at::Tensor& one, const at::Tensor& other) {
  return one.sizes() == other.sizes() && at::equal(one, other);
}

template <typename Element>
bool same(const std::string& field, const c10::List<Element>& one,
          const c10::List<Element>& other) {
  const std::vector<Element> ones = one.vec();
  const std::vector<Element> others = other.vec();
  if (field == "output_names" && ones.empty()) return true;  // that is: without names
  if (ones.size() != others.size()) return false;
  for (size_t i = 0; i < ones.size(); ++i) {
    if (!same(field, ones[i], others[i])) return false;
  }
  return true;
}

template <size_t Bag>
std::string difference_of_bag(const State& before, const State& after) {
  for (const auto& entry : std::get<Bag>(after)) {
    const auto found = std::get<Bag>(before).find(entry.key());
    if (found == std::get<Bag>(before).end()) continue;
    if (!same(entry.key(), found->value(), entry.value())) return entry.key();
  }
  return "";
}

template <typename Value>
c10::Dict<std::string, c10::List<Value>> copy_lists(
    const c10::Dict<std::string, c10::List<Value>>& bag) {
  c10::Dict<std::string, c10::List<Value>> copied;
  for (const auto& entry : bag) copied.insert(entry.key(), entry.value().copy());
  return copied;
}

}  // namespace

std::vector<Base> base_states(const at::Tensor& carried_library) {
  std::vector<Base> bases;
  bases.push_back({"portable", subgraph::encode(portable(), {})});
  bases.push_back({"held", subgraph::encode(held(), {true, false, false, {1, 1}})});

  Executable with_signature = portable();
  with_signature.signature->set({subgraph::signed_digest(subgraph::encode(with_signature, {})),
                                 std::string(64, 'b'), std::string(128, 'c')});
  bases.push_back({"signed", subgraph::encode(with_signature, {})});

  Executable elsewhere = native(carried_library);
  elsewhere.requirements.arch = "pdp11";
  bases.push_back(
      {"native of another machine", subgraph::encode(elsewhere, {true, false, true, {1, 2}})});

  Executable both = portable();
  both.format = Format::kInductor;
  both.requirements = {"pdp11", {"neverheardof"}, TORCH_VERSION, "host"};
  both.code = content(carried_library, false);
  bases.push_back({"native and portable", subgraph::encode(both, {})});

  Executable damaged = native(carried_library);
  damaged.code = std::make_shared<Content>(carried_library, std::string(64, 'a'), std::nullopt);
  bases.push_back(
      {"native with damaged code", subgraph::encode(damaged, {false, true, false, {}})});
  return bases;
}

State loadable_native_state(const at::Tensor& carried_library) {
  return subgraph::encode(native(carried_library), {});
}

State copy_of(const State& state) {
  const auto& [version, ints, strings, int_lists, string_lists, tensors] = state;
  return {
      version,       ints.copy(), strings.copy(), copy_lists(int_lists), copy_lists(string_lists),
      tensors.copy()};
}

void mend_digests(State& state, bool contents) {
  auto& [version, ints, strings, int_lists, string_lists, tensors] = state;
  for (const char* name : {"weights", "graph"}) {
    const auto found = tensors.find(name);
    if (!contents || found == tensors.end()) continue;
    const at::Tensor& bytes = found->value();
    if (!bytes.defined() || !subgraph::lies_in_its_storage(bytes)) continue;
    ints.insert_or_assign(message("checksum_", name), runtime::quick_checksum(bytes));
    strings.insert_or_assign(
        message("sha256_", name),
        sha256_hex(bytes.const_data_ptr(), static_cast<size_t>(bytes.numel())));
  }
  strings.insert_or_assign(subgraph::kDigestField, subgraph::state_digest(state));
}

std::string difference(const State& before, const State& after) {
  for (const std::string& field :
       {difference_of_bag<1>(before, after), difference_of_bag<2>(before, after),
        difference_of_bag<3>(before, after), difference_of_bag<4>(before, after),
        difference_of_bag<5>(before, after)}) {
    if (!field.empty()) return field;
  }
  return "";
}

}  // namespace neuron::fuzz
