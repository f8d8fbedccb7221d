#include "subgraph/held_blocks.h"

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>

#include <stdexcept>

#include "common/message.h"
#include "subgraph/held_tensors.h"

namespace neuron::subgraph {
namespace {

class BlockFinder {
 public:
  void visit(const c10::IValue& module, const std::string& prefix) {
    if (!module.isObject()) return;
    const auto& object = module.toObjectRef();
    const auto& type = *object.type();
    const size_t before = found_.size();
    for (size_t i = 0; i < type.numAttributes() && i < object.slots().size(); ++i) {
      const c10::IValue& value = object.slots()[i];
      visit_subgraphs(value, module, prefix);
      if (value.isObject() && value.type()->is_module()) {
        visit(value, prefix + type.getAttributeName(i) + ".");
      }
    }
    if (found_.size() != before) return;
    for (torch::jit::Function* method : type.methods()) {
      if (const auto* function = torch::jit::tryToGraphFunction(*method)) {
        visit_block(*function->graph()->block(), module, prefix);
      }
    }
  }

  std::vector<HeldBlock> take() { return std::move(found_); }

 private:
  /// Subgraphs in an attribute of `module`, also in a container.
  void visit_subgraphs(const c10::IValue& value, const c10::IValue& module,
                       const std::string& prefix) {
    if (value.isList()) {
      const auto list = value.toListRef();
      if (list.empty() || !list[0].isObject()) return;
      for (const auto& element : list) visit_subgraphs(element, module, prefix);
    } else if (value.isTuple()) {
      for (const auto& element : value.toTupleRef().elements()) {
        visit_subgraphs(element, module, prefix);
      }
    } else if (value.isObject()) {
      static const auto& subgraph_type =
          *new c10::ClassTypePtr(c10::getCustomClassType<SubgraphHandle>());
      if (value.toObjectRef().type() == subgraph_type) {
        add(value.toCustomClass<NeuronSubgraph>(), module, prefix);
      }
    }
  }

  /// Calls in the code of `module` whose subgraph is a constant, as `torch.jit.freeze` makes them.
  /// The tensors stay attributes, since the call may write to them.
  void visit_block(const torch::jit::Block& block, const c10::IValue& module,
                   const std::string& prefix) {
    static const auto forward_held = c10::Symbol::fromQualString("neuron_ext::forward_held");
    for (const torch::jit::Node* node : block.nodes()) {
      if (node->kind() == forward_held) visit_call(*node, module, prefix);
      for (const torch::jit::Block* inner : node->blocks()) visit_block(*inner, module, prefix);
    }
  }

  void visit_call(const torch::jit::Node& node, const c10::IValue& module,
                  const std::string& prefix) {
    const auto constant = torch::jit::toIValue(node.input(2));
    const torch::jit::Node& list = *node.input(1)->node();
    if (!constant || !constant->isObject() || list.inputs().empty()) return;
    auto subgraph = constant->toCustomClass<NeuronSubgraph>();
    const auto& executable = subgraph->get()->executable();
    if (executable.held_inputs == 0) return;
    const std::string path = path_of(*list.inputs()[0]);
    const std::string& name = executable.inputs[executable.user_inputs()].name;
    if (!path.ends_with(name)) return;
    const std::string inner = path.substr(0, path.size() - name.size());
    add(std::move(subgraph), module, prefix, inner);
  }

  /// "layers.0.weight" of a value that is an attribute of attributes.
  static std::string path_of(const torch::jit::Value& value) {
    std::string path;
    const torch::jit::Node* node = value.node();
    for (; node->kind() == c10::prim::GetAttr; node = node->input(0)->node()) {
      path = node->s(c10::attr::name) + (path.empty() ? "" : ".") + path;
    }
    return path;
  }

  /// The tensors stand in the submodule `inner` of `module`, which is empty or ends with a point.
  void add(SubgraphHandle subgraph, const c10::IValue& module, const std::string& prefix,
           const std::string& inner = "") {
    const auto& executable = subgraph->get()->executable();
    if (executable.held_inputs == 0) return;
    HeldBlock block;
    const size_t users = executable.user_inputs();
    for (size_t i = users; i < executable.inputs.size(); ++i) {
      const std::string name = inner + executable.inputs[i].name;
      block.held.push_back(resolve(module, name, prefix));
      block.names.emplace_back(prefix + name, i - users);
    }
    for (const auto& [name, input] : executable.tied_names) {
      block.names.emplace_back(prefix + inner + name, static_cast<size_t>(input) - users);
    }
    block.subgraph = std::move(subgraph);
    found_.push_back(std::move(block));
  }

  /// The tensor at a path of attributes, say "layers.0.weight".
  static at::Tensor resolve(c10::IValue value, const std::string& path, const std::string& prefix) {
    for (size_t begin = 0; begin <= path.size();) {
      const size_t end = std::min(path.find('.', begin), path.size());
      const std::string name = path.substr(begin, end - begin);
      if (!value.isObject() || !value.toObjectRef().type()->hasAttribute(name)) break;
      value = c10::IValue(value.toObjectRef().getAttr(name));
      if (end == path.size() && value.isTensor()) return value.toTensor();
      begin = end + 1;
    }
    throw std::runtime_error(message("the module has no tensor '", prefix, path,
                                     "', which its subgraph was traced with; load it again"));
  }

  std::vector<HeldBlock> found_;
};

}  // namespace

std::vector<HeldBlock> find_held_blocks(const c10::IValue& module) {
  BlockFinder finder;
  if (module.isTuple()) {
    const auto& elements = module.toTupleRef().elements();
    for (size_t i = 0; i + 1 < elements.size(); i += 2) {
      finder.visit(elements[i + 1], elements[i].toStringRef());
    }
  } else {
    finder.visit(module, "");
  }
  return finder.take();
}

std::vector<GateWish> request_gates(const std::vector<HeldBlock>& blocks) {
  std::vector<GateWish> gates;
  for (const HeldBlock& block : blocks) {
    const auto& executable = block.subgraph->get()->executable();
    check_held(executable, block.held);
    gates.push_back({gate_of(block.held[0]), request_mode(executable)});
  }
  return gates;
}

}  // namespace neuron::subgraph
