// The only place that registers anything with TorchScript: the class, and the ops that Python and
// graphs call. Each op converts and delegates to subgraph/operations.h.
#include <torch/library.h>

#include "parallel/data_parallel.h"
#include "placement/context.h"
#include "subgraph/cause.h"
#include "subgraph/find_subgraphs.h"
#include "subgraph/operations.h"
#include "subgraph/replace_weights.h"
#include "subgraph/signing.h"

namespace neuron {
namespace {

using subgraph::NeuronSubgraph;
using subgraph::State;
using subgraph::SubgraphHandle;
using subgraph::Subgraphs;

// (name, state, cores, start_nc, nc_count, lazy_load, async_load, dynamic_batch, executions, error,
//  quarantined)
using StatusTuple =
    std::tuple<std::string, std::string, std::vector<int64_t>, int64_t, int64_t, bool, bool, bool,
               std::vector<int64_t>, std::string, std::vector<int64_t>>;

// (index, global_index, cpus, models, executions, busy_seconds, quarantined)
using CoreStatsTuple =
    std::tuple<int64_t, int64_t, std::vector<int64_t>, int64_t, int64_t, double, bool>;

std::vector<StatusTuple> status(const Subgraphs& subgraphs) {
  std::vector<StatusTuple> all;
  for (auto& s : subgraph::status(subgraphs)) {
    all.emplace_back(s.name, s.state, s.cores, s.start_nc, s.nc_count, s.lazy_load, s.async_load,
                     s.dynamic_batch, s.executions, s.error, s.quarantined);
  }
  return all;
}

/// An op over the subgraphs of its first argument, `Any module`: a module, or a list of subgraphs.
/// One op finds them and works on them: each way through PyTorch's bindings costs a caller in
/// Python more than a move of the subgraph itself.
template <typename... Arguments, typename Result>
auto over_subgraphs(Result (*operation)(const Subgraphs&, Arguments...)) {
  return [operation](const c10::IValue& module, std::decay_t<Arguments>... arguments) -> Result {
    return operation(subgraph::find_subgraphs(module), std::move(arguments)...);
  };
}

std::vector<CoreStatsTuple> core_stats() {
  std::vector<CoreStatsTuple> all;
  for (const auto& s : subgraph::core_stats()) {
    all.emplace_back(s.index, s.global_index, std::vector<int64_t>(s.cpus.begin(), s.cpus.end()),
                     s.models, s.executions, s.busy_seconds, s.quarantined);
  }
  return all;
}

void push_tensors(torch::jit::Stack* stack, runtime::Tensors tensors) {
  c10::List<at::Tensor> results;
  results.reserve(tensors.size());
  for (at::Tensor& tensor : tensors) results.push_back(std::move(tensor));
  torch::jit::push(*stack, std::move(results));
}

/// On the stack, as the interpreter calls it: the conversions of an ordinary C++ op allocate more
/// than the rest of a call.
void forward(const c10::OperatorHandle& /*op*/, torch::jit::Stack* stack) {
  const auto subgraph = torch::jit::pop(*stack).toCustomClass<NeuronSubgraph>();
  const c10::IValue list = torch::jit::pop(*stack);
  runtime::Tensors inputs;
  for (const c10::IValue& input : list.toListRef()) inputs.push_back(input.toTensor());
  push_tensors(stack, subgraph::noting_cause([&] { return subgraph::forward(inputs, subgraph); }));
}

c10::IValue make_parallel(const c10::IValue& model, std::optional<std::vector<int64_t>> device_ids,
                          int64_t dim, bool dynamic_batching) {
  return parallel::make_parallel(torch::jit::Module(model.toObject()), device_ids, dim,
                                 dynamic_batching)
      ._ivalue();
}

c10::IValue forward_parallel(const c10::IValue& models, const c10::IValue& arguments,
                             const std::vector<std::string>& names,
                             const std::vector<int64_t>& cores_of_models, int64_t dim,
                             int64_t split_size, int64_t traced_rows, int64_t workers,
                             bool holds_tensors) {
  std::vector<torch::jit::Module> modules;
  for (const auto& model : models.toTupleRef().elements()) modules.push_back(model.toModule());
  int64_t cores = 0;
  for (const int64_t count : cores_of_models) cores += count;
  const parallel::Cut cut{dim, cores, split_size, traced_rows, workers, holds_tensors};
  return subgraph::noting_cause([&] {
    return parallel::forward_parallel(modules, cores_of_models,
                                      arguments.toTupleRef().elements().vec(), names, cut);
  });
}

/// (text, whether it is the caller's fault), or nothing.
std::optional<std::tuple<std::string, bool>> take_cause(const std::string& text) {
  const auto cause = subgraph::take_cause(text);
  if (!cause) return std::nullopt;
  return std::tuple(cause->text, cause->callers_fault);
}

void forward_held(const c10::OperatorHandle& /*op*/, torch::jit::Stack* stack) {
  const auto subgraph = torch::jit::pop(*stack).toCustomClass<NeuronSubgraph>();
  const c10::IValue held_list = torch::jit::pop(*stack);
  const c10::IValue input_list = torch::jit::pop(*stack);
  runtime::Tensors inputs, held;
  for (const c10::IValue& input : input_list.toListRef()) inputs.push_back(input.toTensor());
  for (const c10::IValue& one : held_list.toListRef()) held.push_back(one.toTensor());
  push_tensors(stack, subgraph::noting_cause(
                          [&] { return subgraph::forward_held(inputs, held, subgraph); }));
}

bool replace_weights(const c10::IValue& module, const c10::Dict<std::string, at::Tensor>& weights) {
  subgraph::NamedTensors named;
  for (const auto& entry : weights) named.emplace_back(entry.key(), entry.value());
  return subgraph::replace_weights(module, named);
}

TORCH_LIBRARY(neuron_ext, m) {
  m.class_<NeuronSubgraph>("NeuronSubgraph")
      .def(torch::init([](int64_t version, decltype(std::get<1>(State{})) ints,
                          c10::Dict<std::string, std::string> strings,
                          c10::Dict<std::string, c10::List<int64_t>> int_lists,
                          c10::Dict<std::string, c10::List<std::string>> string_lists,
                          c10::Dict<std::string, at::Tensor> tensors) {
        return NeuronSubgraph::from_trace(
            State(version, ints, strings, int_lists, string_lists, tensors));
      }))
      .def_pickle([](const SubgraphHandle& self) -> State { return self->state(); },
                  [](State state) -> SubgraphHandle { return NeuronSubgraph::from_file(state); });

  m.def(
      "forward(Tensor[] inputs, __torch__.torch.classes.neuron_ext.NeuronSubgraph subgraph)"
      " -> Tensor[]",
      torch::CppFunction::makeFromBoxedFunction<&forward>());

  // Conservative: it may write to all that it is given. So nothing that compiles or freezes graphs
  // leaves out, merges or reorders calls, or makes constants of the tensors.
  m.def(torch::schema("forward_held(Tensor[] inputs, Tensor[] held, "
                      "__torch__.torch.classes.neuron_ext.NeuronSubgraph subgraph) -> Tensor[]",
                      c10::AliasAnalysisKind::CONSERVATIVE),
        torch::CppFunction::makeFromBoxedFunction<&forward_held>());

  // What the generated forward of a traced module calls where its arguments do not fit: an error of
  // an op reaches Python as a RuntimeError, one raised by TorchScript itself does not.
  m.def("refuse", [](const std::string& why) {
    subgraph::noting_cause([&] { throw std::invalid_argument(why); });
  });
  // Conservative: the models may have state that a forward changes.
  m.def(torch::schema(
            "forward_parallel(Any models, Any arguments, str[] names, int[] cores_of_models,"
            " int dim, int split_size, int traced_rows, int workers, bool holds_tensors) -> Any",
            c10::AliasAnalysisKind::CONSERVATIVE),
        forward_parallel);
  m.def("make_parallel(Any model, int[]? device_ids, int dim, bool dynamic_batching) -> Any",
        make_parallel);
  m.def("disable_dynamic_batching(Any parallel) -> ()", [](const c10::IValue& made) {
    torch::jit::Module parallel(made.toObject());
    parallel::disable_dynamic_batching(parallel);
  });
  m.def("take_cause", take_cause);
  m.def("subgraphs", [](const c10::IValue& module) { return subgraph::find_subgraphs(module); });
  m.def("set_neuron_cores(Any module, int start_nc, int nc_count) -> ()",
        over_subgraphs(subgraph::set_neuron_cores));
  m.def("set_multicore(Any module) -> ()", over_subgraphs(subgraph::set_multicore));
  m.def("set_lazy_load(Any module, bool enable) -> ()", over_subgraphs(subgraph::set_lazy_load));
  m.def("set_async_load(Any module, bool enable) -> ()", over_subgraphs(subgraph::set_async_load));
  m.def("set_dynamic_batch(Any module, bool enable) -> ()",
        over_subgraphs(subgraph::set_dynamic_batch));
  m.def("replace_weights(Any module, Dict(str, Tensor) weights) -> bool", replace_weights);
  m.def("reset_state(Any module) -> ()", subgraph::reset_state);
  m.def("sign(Any module, str private_key_file) -> str", over_subgraphs(subgraph::sign));
  m.def("verify(Any module, str public_keys_file) -> ()", over_subgraphs(subgraph::verify));
  m.def("status", over_subgraphs(status));
  m.def("wait(Any module, float? timeout) -> bool", over_subgraphs(subgraph::wait));
  m.def("unload(Any module) -> ()", over_subgraphs(subgraph::unload));
  m.def("enter_neuron_cores_context", subgraph::enter_neuron_cores_context);
  m.def("enter_multicore_context", subgraph::enter_multicore_context);
  m.def("exit_context", exit_placement_context);
  m.def("prepare_exit", subgraph::prepare_exit);
  m.def("visible_core_count", subgraph::visible_core_count);
  m.def("host_threads_per_core", subgraph::host_threads_per_core);
  m.def("core_stats", core_stats);
}

}  // namespace
}  // namespace neuron
