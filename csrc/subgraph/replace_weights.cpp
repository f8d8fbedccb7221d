#include "subgraph/replace_weights.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "common/message.h"
#include "runtime/runtime.h"
#include "subgraph/held_blocks.h"
#include "subgraph/held_tensors.h"
#include "subgraph/input_check.h"

namespace neuron::subgraph {
namespace {

/// One tensor to be replaced. Tied weights are one under several names, and blocks may share some.
struct Target {
  at::Tensor tensor;
  const runtime::TensorSpec* spec;
  bool is_state;
  std::vector<std::string> names;
  at::Tensor source{};
  std::string source_name{};
};

class Replacement {
 public:
  explicit Replacement(const std::vector<HeldBlock>& blocks) {
    for (const HeldBlock& block : blocks) add(block);
  }

  bool has_weights() const {
    return std::ranges::any_of(targets_, [](const Target& target) { return !target.is_state; });
  }

  /// Finds a source for each target.
  /// @throws std::invalid_argument with all that does not fit.
  void match(const NamedTensors& weights) {
    std::vector<std::string> unexpected;
    std::vector<std::string> misfits;
    for (const auto& [name, tensor] : weights) {
      const auto found = by_name_.find(name);
      if (found == by_name_.end()) {
        unexpected.push_back(name);
      } else if (Target& target = targets_[found->second]; !target.is_state) {
        set_source(target, name, tensor, misfits);
      }
    }
    std::vector<std::string> missing;
    for (const Target& target : targets_) {
      if (!target.is_state && target.source_name.empty()) missing.push_back(target.names.front());
    }
    std::vector<std::string> problems;
    if (!missing.empty()) problems.push_back(message("missing: ", join(missing)));
    if (!unexpected.empty()) problems.push_back(message("unexpected: ", join(unexpected)));
    problems.insert(problems.end(), misfits.begin(), misfits.end());
    if (problems.empty()) return;
    throw std::invalid_argument(message(
        "these weights do not fit the traced module, and none was replaced. ", join(problems, "; "),
        ". Pass the state dict of a model like the one that was traced"));
  }

  /// Under the gates of all blocks.
  void copy() {
    std::vector<TensorCopy> copies;
    copies.reserve(targets_.size());
    for (Target& target : targets_) {
      if (target.is_state || same_place(target.source, target.tensor)) continue;
      // Weights that are views of what is written here would change on the way.
      if (by_storage_.contains(target.source.storage().unsafeGetStorageImpl())) {
        const at::NoGradGuard no_grad;
        target.source = target.source.clone();
      }
      copies.push_back({target.tensor, target.source});
    }
    copy_in_place(copies);
  }

 private:
  static bool same_place(const at::Tensor& one, const at::Tensor& other) {
    return share_storage(one, other) && one.storage_offset() == other.storage_offset() &&
           one.sizes() == other.sizes() && one.strides() == other.strides() &&
           one.is_conj() == other.is_conj() && one.is_neg() == other.is_neg();
  }

  void add(const HeldBlock& block) {
    const auto& executable = block.subgraph->get()->executable();
    check_held(executable, block.held);
    std::vector<size_t> places;
    for (size_t i = 0; i < block.held.size(); ++i) {
      const auto input = executable.user_inputs() + i;
      const bool is_state = std::ranges::any_of(executable.aliases, [&](const auto& alias) {
        return static_cast<size_t>(alias.input) == input;
      });
      const auto [first, last] =
          by_storage_.equal_range(block.held[i].storage().unsafeGetStorageImpl());
      const auto known = std::find_if(first, last, [&](const auto& entry) {
        return same_place(targets_[entry.second].tensor, block.held[i]);
      });
      if (known != last) {
        places.push_back(known->second);
        continue;
      }
      places.push_back(targets_.size());
      by_storage_.emplace(block.held[i].storage().unsafeGetStorageImpl(), targets_.size());
      targets_.push_back({block.held[i], &executable.inputs[input], is_state, {}});
    }
    for (const auto& [name, held] : block.names) {
      targets_[places[held]].names.push_back(name);
      by_name_.emplace(name, places[held]);
    }
  }

  static void set_source(Target& target, const std::string& name, const at::Tensor& tensor,
                         std::vector<std::string>& misfits) {
    if (std::string misfit = misfit_of(*target.spec, tensor); !misfit.empty()) {
      misfits.push_back(message("'", name, "': ", misfit));
      target.source_name = name;
      return;
    }
    if (target.source.defined() && !same_place(target.source, tensor) &&
        !at::equal(target.source, tensor)) {
      misfits.push_back(message("'", target.source_name, "' and '", name,
                                "' are one tensor in the traced module, and differ here"));
    }
    target.source = tensor;
    target.source_name = name;
  }

  std::vector<Target> targets_;
  std::unordered_map<std::string, size_t> by_name_;
  std::unordered_multimap<const c10::StorageImpl*, size_t> by_storage_;
};

std::vector<GateWish> exclusive(std::vector<GateWish> gates) {
  for (GateWish& wish : gates) wish.mode = HeldGate::Mode::kExclusive;
  return gates;
}

}  // namespace

bool replace_weights(const c10::IValue& module, const NamedTensors& weights) {
  runtime::Runtime::check_not_forked();
  const runtime::ExitGate exit;
  const auto blocks = find_held_blocks(module);
  Replacement replacement(blocks);
  if (!replacement.has_weights()) return false;
  replacement.match(weights);
  const GateScope gates(exclusive(request_gates(blocks)));
  replacement.copy();
  return true;
}

void reset_state(const c10::IValue& module) {
  runtime::Runtime::check_not_forked();
  const runtime::ExitGate exit;
  auto blocks = find_held_blocks(module);
  std::erase_if(blocks, [](const HeldBlock& block) {
    return block.subgraph->get()->executable().aliases.empty();
  });
  const GateScope gates(exclusive(request_gates(blocks)));
  for (const HeldBlock& block : blocks) {
    reset_held(block.subgraph->get()->executable(), block.held);
  }
}

}  // namespace neuron::subgraph
