#include "subgraph/find_subgraphs.h"

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <unordered_set>

namespace neuron::subgraph {
namespace {

class Finder {
 public:
  void visit(const c10::IValue& value) {
    if (value.isObject()) {
      visit_object(value);
    } else if (value.isTuple()) {
      for (const auto& element : value.toTupleRef().elements()) visit(element);
    } else if (value.isList()) {
      if (may_hold(value.toListRef())) {
        for (const auto& element : value.toListRef()) visit(element);
      }
    } else if (value.isGenericDict()) {
      for (const auto& entry : value.toGenericDict()) visit(entry.value());
    }
  }

  std::vector<SubgraphHandle> take() { return std::move(found_); }

 private:
  // Lists of numbers and tensors can be long and hold nothing.
  static bool may_hold(c10::ArrayRef<c10::IValue> list) {
    return !list.empty() &&
           (list[0].isObject() || list[0].isTuple() || list[0].isList() || list[0].isGenericDict());
  }

  void visit_object(const c10::IValue& value) {
    const auto& object = value.toObjectRef();
    if (!seen_.insert(&object).second) return;
    static const auto& subgraph_type =
        *new c10::ClassTypePtr(c10::getCustomClassType<SubgraphHandle>());
    if (object.type() == subgraph_type) {
      auto handle = value.toCustomClass<NeuronSubgraph>();
      if (seen_.insert(handle.get()).second) found_.push_back(std::move(handle));
      return;
    }
    for (const auto& slot : object.slots()) visit(slot);
    for (torch::jit::Function* method : object.type()->methods()) visit_method(*method);
  }

  void visit_method(torch::jit::Function& method) {
    if (!seen_.insert(&method).second) return;
    // A graph that is not made yet would be made here, by compiling its source: freezing, which
    // hides subgraphs in constants, has made it.
    if (const auto* function = torch::jit::tryToGraphFunction(method))
      visit_block(*function->graph()->block());
  }

  void visit_block(const torch::jit::Block& block) {
    for (const torch::jit::Node* node : block.nodes()) {
      if (node->kind() == c10::prim::Constant && node->hasAttribute(c10::attr::value) &&
          node->kindOf(c10::attr::value) == torch::jit::AttributeKind::ival) {
        visit(node->ival(c10::attr::value));
      }
      for (const torch::jit::Block* inner : node->blocks()) visit_block(*inner);
    }
  }

  std::vector<SubgraphHandle> found_;
  std::unordered_set<const void*> seen_;
};

}  // namespace

std::vector<SubgraphHandle> find_subgraphs(const c10::IValue& value) {
  Finder finder;
  finder.visit(value);
  return finder.take();
}

}  // namespace neuron::subgraph
