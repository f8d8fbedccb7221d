#include "subgraph/state_digest.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "common/sha256.h"
#include "subgraph/state_reader.h"

namespace neuron::subgraph {
namespace {

/// Collects what is hashed: numbers as eight little-endian bytes, texts after their length.
class Canonical {
 public:
  /// @param left_out names of fields that do not count.
  explicit Canonical(std::set<std::string> left_out) : left_out_(std::move(left_out)) {}

  void add(int64_t number) {
    for (int shift = 0; shift < 64; shift += 8) {
      bytes_ += static_cast<char>(static_cast<uint64_t>(number) >> shift & 0xff);
    }
  }
  void add(const std::string& text) {
    add(static_cast<int64_t>(text.size()));
    bytes_ += text;
  }
  template <typename Element>
  void add(const c10::List<Element>& list) {
    add(static_cast<int64_t>(list.size()));
    for (const Element& element : list.vec()) add(element);
  }
  void add_bytes(const at::Tensor& tensor) {
    bytes_.append(static_cast<const char*>(tensor.const_data_ptr()),
                  static_cast<size_t>(tensor.nbytes()));
  }

  /// The entries of a bag, in the order of their names, each by `add_value(name, value)`.
  template <typename Value, typename AddValue>
  void add_bag(const c10::Dict<std::string, Value>& bag, AddValue add_value) {
    std::vector<std::string> names;
    for (const auto& entry : bag) {
      if (!left_out_.contains(entry.key())) names.push_back(entry.key());
    }
    std::sort(names.begin(), names.end());
    add(static_cast<int64_t>(names.size()));
    for (const auto& name : names) {
      add(name);
      add_value(name, bag.at(name));
    }
  }

  std::string sha256() const { return sha256_hex(bytes_.data(), bytes_.size()); }

 private:
  const std::set<std::string> left_out_;
  std::string bytes_;
};

bool has_own_digest(const std::string& name) {
  return name == "code" || name == "weights" || name == "graph";
}

std::string digest_without(const State& state, std::set<std::string> left_out) {
  const auto& [version, ints, strings, int_lists, string_lists, tensors] = state;
  Canonical canonical(std::move(left_out));
  const auto add = [&](const std::string&, const auto& value) { canonical.add(value); };
  canonical.add(version);
  canonical.add_bag(ints, add);
  canonical.add_bag(strings, add);
  canonical.add_bag(int_lists, add);
  canonical.add_bag(string_lists, add);
  canonical.add_bag(tensors, [&](const std::string& name, const at::Tensor& tensor) {
    // Fields that this version does not know come here without having been looked at.
    if (tensor.defined() && tensor.layout() != at::kStrided) {
      StateReader::reject(name, "is not a dense tensor");
    }
    canonical.add(tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : -1);
    // Anything but contiguous bytes on the CPU is refused by whoever reads the field.
    if (tensor.defined() && !has_own_digest(name) && tensor.is_cpu() && tensor.is_contiguous()) {
      if (!lies_in_its_storage(tensor)) StateReader::reject(name, "is longer than its data");
      canonical.add_bytes(tensor);
    }
  });
  return canonical.sha256();
}

}  // namespace

std::string state_digest(const State& state) {
  return digest_without(state, {kDigestField});
}

std::string signed_digest(const State& state) {
  return digest_without(state, {kDigestField, kSignatureField, kSignerField, "lazy_load",
                                "async_load", "dynamic_batch", "start_nc", "nc_count"});
}

}  // namespace neuron::subgraph
