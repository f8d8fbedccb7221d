#include "subgraph/held_blocks.h"

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
    for (size_t i = 0; i < type.numAttributes() && i < object.slots().size(); ++i) {
      const c10::IValue& value = object.slots()[i];
      visit_subgraphs(value, module, prefix);
      if (value.isObject() && value.type()->is_module()) {
        visit(value, prefix + type.getAttributeName(i) + ".");
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

  void add(SubgraphHandle subgraph, const c10::IValue& module, const std::string& prefix) {
    const auto& executable = subgraph->get()->executable();
    if (executable.held_inputs == 0) return;
    HeldBlock block;
    const size_t users = executable.user_inputs();
    for (size_t i = users; i < executable.inputs.size(); ++i) {
      const std::string& name = executable.inputs[i].name;
      block.held.push_back(resolve(module, name, prefix));
      block.names.emplace_back(prefix + name, i - users);
    }
    for (const auto& [name, input] : executable.tied_names) {
      block.names.emplace_back(prefix + name, static_cast<size_t>(input) - users);
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
