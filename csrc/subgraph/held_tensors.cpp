#include "subgraph/held_tensors.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <unordered_map>

#include "common/message.h"
#include "common/parallel.h"
#include "subgraph/input_check.h"
#include "subgraph/state.h"

namespace neuron::subgraph {

using runtime::Executable;
using runtime::StateAlias;
using runtime::TensorRefs;
using runtime::Tensors;
using runtime::TensorSpec;

namespace {

/// One gate for each storage that has one. A weak reference keeps the address of a storage that is
/// gone from being given to another one, until the entry goes.
class Gates {
 public:
  std::shared_ptr<HeldGate> find(const c10::Storage& storage) EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    const auto found = gates_.find(storage.unsafeGetStorageImpl());
    if (found != gates_.end()) return found->second.gate;
    if (gates_.size() >= sweep_at_) {
      std::erase_if(gates_, [](const auto& entry) { return entry.second.storage.expired(); });
      sweep_at_ = std::max(kLeastSweep, 2 * gates_.size());
    }
    auto gate = std::make_shared<HeldGate>();
    gates_.emplace(storage.unsafeGetStorageImpl(), Entry{storage.getWeakStorageImpl(), gate});
    return gate;
  }

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    std::shared_ptr<HeldGate> gate;
  };
  static constexpr size_t kLeastSweep = 64;

  Mutex mutex_;
  std::unordered_map<const c10::StorageImpl*, Entry> gates_ GUARDED_BY(mutex_);
  size_t sweep_at_ GUARDED_BY(mutex_) = kLeastSweep;
};

bool dense(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

}  // namespace

std::shared_ptr<HeldGate> gate_of(const at::Tensor& first) {
  static auto& gates = *new Gates();  // threads may come here until the very end
  return gates.find(first.storage());
}

HeldGate::Mode request_mode(const Executable& executable) {
  return executable.aliases.empty() ? HeldGate::Mode::kShared : HeldGate::Mode::kExclusive;
}

void check_held(const Executable& executable, TensorRefs held) {
  const size_t users = executable.user_inputs();
  if (held.size() != executable.inputs.size() - users) {
    throw std::invalid_argument(message("subgraph '", executable.name, "' holds ",
                                        executable.inputs.size() - users, " tensors, got ",
                                        held.size()));
  }
  for (size_t i = 0; i < held.size(); ++i) {
    check_input(executable, executable.inputs[users + i], held[i],
                "a weight or state of a traced module keeps its shape and dtype");
  }
}

bool share_storage(const at::Tensor& one, const at::Tensor& other) {
  return one.has_storage() && other.has_storage() &&
         one.storage().unsafeGetStorageImpl() == other.storage().unsafeGetStorageImpl();
}

void copy_in_place(const std::vector<TensorCopy>& copies) {
  struct Piece {
    char* to;
    const char* from;
    size_t begin;  ///< where it stands in the sum of all
    size_t size;
  };
  std::vector<Piece> pieces;
  pieces.reserve(copies.size());
  size_t total = 0;
  for (const auto& [to, from] : copies) {
    if (to.numel() == 0 || !dense(to) || !dense(from)) continue;
    pieces.push_back({static_cast<char*>(to.mutable_data_ptr()),
                      static_cast<const char*>(from.const_data_ptr()), total, to.nbytes()});
    total += to.nbytes();
  }
  in_parallel(total, [&](size_t begin, size_t end) {
    auto piece = std::ranges::upper_bound(pieces, begin, {}, &Piece::begin);
    if (piece != pieces.begin()) --piece;
    for (; piece != pieces.end() && piece->begin < end; ++piece) {
      const size_t first = std::max(begin, piece->begin) - piece->begin;
      const size_t last = std::min(end - piece->begin, piece->size);
      // Two names for the same bytes may stand in one storage.
      if (first < last) std::memmove(piece->to + first, piece->from + first, last - first);
    }
  });
  const c10::InferenceMode no_bookkeeping;  // also lets tensors of that mode be written
  for (const auto& [to, from] : copies) {
    if (to.numel() == 0) continue;
    if (!dense(to) || !dense(from)) {
      to.copy_(from);
    } else if (!to.is_inference()) {
      to.unsafeGetTensorImpl()->bump_version();
    }
  }
}

void finish_held(const Executable& executable, TensorRefs held, Tensors& outputs) {
  for (const StateAlias& alias : executable.aliases) {
    const at::Tensor& to = held[static_cast<size_t>(alias.input) - executable.user_inputs()];
    const at::Tensor& from = outputs[static_cast<size_t>(alias.output)];
    if (from.sizes() != to.sizes() || from.scalar_type() != to.scalar_type()) {
      throw std::runtime_error(message(
          "output ", alias.output, " of subgraph '", executable.name, "' is a ",
          dtype_name(from.scalar_type()), " tensor of shape [", join(from.sizes()),
          "], which does not fit the state '",
          executable.inputs[static_cast<size_t>(alias.input)].name, "': the file is damaged"));
    }
  }
  // The caller keeps what it gets; and a state may be computed out of another one.
  for (at::Tensor& output : outputs) {
    for (const at::Tensor& one : held) {
      if (!share_storage(output, one)) continue;
      const at::NoGradGuard no_grad;
      output = output.clone();
      break;
    }
  }
  if (executable.aliases.empty()) return;
  std::vector<TensorCopy> copies;
  copies.reserve(executable.aliases.size());
  for (const StateAlias& alias : executable.aliases) {
    copies.push_back({held[static_cast<size_t>(alias.input) - executable.user_inputs()],
                      outputs[static_cast<size_t>(alias.output)]});
  }
  copy_in_place(copies);
}

void reset_held(const Executable& executable, TensorRefs held) {
  const c10::InferenceMode no_bookkeeping;
  for (const StateAlias& alias : executable.aliases) {
    const auto input = static_cast<size_t>(alias.input);
    const TensorSpec& spec = executable.inputs[input];
    const at::Tensor& to = held[input - executable.user_inputs()];
    if (to.numel() == 0) continue;
    // One element stands for all where they are equal.
    const bool single = alias.initial.numel() < static_cast<int64_t>(to.nbytes());
    const at::Tensor values =
        at::from_blob(const_cast<void*>(alias.initial.const_data_ptr()),
                      single ? at::IntArrayRef() : at::IntArrayRef(spec.shape), spec.dtype);
    to.copy_(values.expand(spec.shape));
  }
}

}  // namespace neuron::subgraph
