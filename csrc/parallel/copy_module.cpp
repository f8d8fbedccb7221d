#include "parallel/copy_module.h"

#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "subgraph/find_subgraphs.h"

namespace neuron::parallel {
namespace {

using c10::IValue;
using subgraph::NeuronSubgraph;

/// What stands for each tensor and subgraph of a module in its copy.
class Substitutes {
 public:
  explicit Substitutes(const IValue& module) { visit(module); }

  IValue::HashIdentityIValueMap& map() { return map_; }

 private:
  void visit(const IValue& value) {
    if (value.isTensor()) {
      map_.emplace(value, value);
    } else if (value.isTuple()) {
      for (const auto& item : value.toTupleRef().elements()) visit(item);
    } else if (value.isList()) {
      for (const auto& item : value.toListRef()) visit(item);
    } else if (value.isGenericDict()) {
      for (const auto& entry : value.toGenericDict()) visit(entry.value());
    } else if (value.isObject()) {
      visit_object(value);
    }
  }

  void visit_object(const IValue& value) {
    const auto& object = value.toObjectRef();
    if (!seen_.insert(&object).second) return;
    if (object.type() == c10::getCustomClassType<subgraph::SubgraphHandle>()) {
      const auto handle = value.toCustomClass<NeuronSubgraph>();
      auto& copy = copies_[handle.get()];
      if (!copy) copy = c10::make_intrusive<NeuronSubgraph>(handle->get()->copy());
      map_.emplace(value, IValue(copy));
      return;
    }
    for (const auto& slot : object.slots()) visit(slot);
  }

  IValue::HashIdentityIValueMap map_;
  std::unordered_set<const void*> seen_;
  std::unordered_map<const void*, subgraph::SubgraphHandle> copies_;
};

}  // namespace

torch::jit::Module copy_with_same_tensors(const torch::jit::Module& module) {
  Substitutes substitutes(module._ivalue());
  torch::jit::Module copy(IValue(module._ivalue()).deepcopy(substitutes.map()).toObject());
  std::unordered_set<const void*> originals;
  for (const auto& handle : subgraph::find_subgraphs(module._ivalue())) {
    originals.insert(handle.get());
  }
  for (const auto& handle : subgraph::find_subgraphs(copy._ivalue())) {
    if (originals.contains(handle.get())) {
      throw std::invalid_argument(
          "a frozen module cannot be copied to cores that are not consecutive: give consecutive "
          "device_ids, or the module as it was before torch.jit.freeze");
    }
  }
  return copy;
}

}  // namespace neuron::parallel
