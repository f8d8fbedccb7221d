#include "parallel/data_parallel.h"

#include <neuron_ext/data_parallel.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/ir.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <utility>

#include "common/message.h"
#include "parallel/chunk_run.h"
#include "parallel/chunk_times.h"
#include "parallel/copy_module.h"
#include "parallel/scatter.h"
#include "runtime/runtime.h"
#include "subgraph/batch.h"
#include "subgraph/cause.h"
#include "subgraph/find_subgraphs.h"
#include "subgraph/held_blocks.h"
#include "subgraph/operations.h"

namespace neuron::parallel {
namespace {

using c10::IValue;
using runtime::Executable;
using runtime::Runtime;
using subgraph::Subgraphs;
using torch::jit::Module;

/// Consecutive cores.
struct CoreRun {
  int64_t first = 0;
  int64_t count = 0;
};

std::vector<int64_t> checked_ids(const std::optional<std::vector<int64_t>>& device_ids) {
  const int64_t cores = Runtime::get().core_count();
  std::vector<int64_t> ids(static_cast<size_t>(cores));
  std::iota(ids.begin(), ids.end(), 0);
  if (!device_ids) return ids;
  const std::string remedy =
      message("; this process sees ", cores, " cores (0-", cores - 1, "): give each core once");
  if (device_ids->empty()) throw std::invalid_argument("device_ids is empty" + remedy);
  std::set<int64_t> seen;
  for (const int64_t id : *device_ids) {
    if (id < 0 || id >= cores) {
      throw std::invalid_argument(message("device_ids holds ", id, remedy));
    }
    if (!seen.insert(id).second) {
      throw std::invalid_argument(message("device_ids holds ", id, " more than once", remedy));
    }
  }
  return *device_ids;
}

std::vector<CoreRun> consecutive_runs(std::vector<int64_t> ids) {
  std::ranges::sort(ids);
  std::vector<CoreRun> runs;
  for (const int64_t id : ids) {
    if (!runs.empty() && runs.back().first + runs.back().count == id) {
      ++runs.back().count;
    } else {
      runs.push_back({id, 1});
    }
  }
  return runs;
}

/// The size that every input and output has in dimension `dim`, or 0.
int64_t common_size(const Executable& executable, int64_t dim) {
  std::vector<runtime::TensorSpec> specs(
      executable.inputs.begin(),
      executable.inputs.begin() + static_cast<std::ptrdiff_t>(executable.user_inputs()));
  specs.insert(specs.end(), executable.outputs.begin(), executable.outputs.end());
  int64_t common = -1;
  for (const auto& spec : specs) {
    const auto rank = static_cast<int64_t>(spec.shape.size());
    const int64_t at = dim < 0 ? dim + rank : dim;
    if (at < 0 || at >= rank) return 0;
    if (common < 0) common = spec.shape[static_cast<size_t>(at)];
    if (common != spec.shape[static_cast<size_t>(at)]) return 0;
  }
  return std::max<int64_t>(common, 0);
}

bool batchable(const Executable& executable) {
  try {
    subgraph::check_batchable(executable);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

void check_stateless(const Subgraphs& subgraphs) {
  for (const auto& handle : subgraphs) {
    const Executable& executable = handle->get()->executable();
    if (executable.aliases.empty()) continue;
    throw std::invalid_argument(
        message("subgraph '", executable.name,
                "' keeps state between calls, which chunks that are computed at once cannot share: "
                "give each core a copy.deepcopy of the module instead"));
  }
}

bool holds_tensors(const Subgraphs& subgraphs) {
  return std::ranges::any_of(
      subgraphs, [](const auto& handle) { return handle->get()->executable().held_inputs > 0; });
}

/// Rows that chunks are best multiples of, where batches of any size can be taken; else 0.
int64_t traced_rows(const Module& model, const Subgraphs& subgraphs, int64_t dim) {
  if (subgraphs.empty()) return 0;
  if (dim == 0) {
    int64_t common = 0;
    for (const auto& handle : subgraphs) {
      const Executable& executable = handle->get()->executable();
      if (!batchable(executable)) return 0;
      const int64_t rows = subgraph::chunk_rows(executable);
      common = common == 0 || common == rows ? rows : 1;
    }
    return common;
  }
  // Along another dimension the chunks are padded here. That is right only where the rows of the
  // module are those of its subgraph: in a traced module, not in one that does more around it.
  const Executable& executable = subgraphs[0]->get()->executable();
  const bool is_traced = subgraphs.size() == 1 && model.hasattr("subgraph");
  if (!is_traced || !executable.mutated_inputs.empty()) return 0;
  return common_size(executable, dim);
}

/// Fills in `forward`: the model's signature around the op neuron_ext::forward_parallel.
void define_forward(Module& parallel, const Module& model, const std::vector<std::string>& models) {
  const c10::FunctionSchema& schema = model.get_method("forward").function().getSchema();
  const auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::Value* self = graph->addInput("self")->setType(parallel.type());
  std::vector<c10::Argument> arguments{c10::Argument("self", parallel.type())};
  std::vector<torch::jit::Value*> inputs;
  c10::List<std::string> names;
  for (size_t i = 1; i < schema.arguments().size(); ++i) {
    const c10::Argument& argument = schema.arguments()[i];
    inputs.push_back(graph->addInput(argument.name())->setType(argument.type()));
    arguments.push_back(argument);
    names.push_back(argument.name());
  }
  std::vector<torch::jit::Value*> modules;
  for (const auto& name : models) modules.push_back(graph->insertGetAttr(self, name));
  const auto tuple = [&](const std::vector<torch::jit::Value*>& items) {
    return graph->insertNode(graph->createTuple(items))->output();
  };
  const auto attribute = [&](const char* name) { return graph->insertGetAttr(self, name); };
  torch::jit::Value* result = graph->insert(
      c10::Symbol::fromQualString("neuron_ext::forward_parallel"),
      {tuple(modules), tuple(inputs), graph->insertConstant(names), attribute("cores_of_models"),
       attribute("dim"), attribute("split_size"), attribute("traced_rows"),
       attribute("num_workers"), attribute("holds_tensors")});
  const c10::TypePtr& type = schema.returns().at(0).type();
  if (type->kind() != c10::TypeKind::AnyType) result = graph->insertUncheckedCast(result, type);
  graph->registerOutput(result);
  const c10::QualifiedName name(*parallel.type()->name(), "forward");
  auto* function = parallel._ivalue()->compilation_unit()->create_function(name, graph);
  function->setSchema(c10::FunctionSchema("forward", "", arguments, schema.returns()));
  parallel.type()->addMethod(function);
}

Module assemble(const std::vector<Module>& models, const std::vector<CoreRun>& runs,
                const std::vector<int64_t>& ids, int64_t dim, int64_t rows, bool holds_tensors) {
  Module parallel("__torch__.neuron_ext.DataParallel",
                  std::make_shared<torch::jit::CompilationUnit>(), /*shouldMangle=*/true);
  std::vector<std::string> names;
  c10::List<int64_t> cores_of_models;
  for (size_t i = 0; i < models.size(); ++i) {
    names.push_back(i == 0 ? "module" : message("module_", i));
    parallel.register_module(names.back(), models[i]);
    cores_of_models.push_back(runs[i].count);
  }
  const auto set = [&](const char* name, int64_t value) {
    parallel.register_attribute(name, c10::IntType::get(), value);
  };
  const auto list = c10::ListType::ofInts();
  parallel.register_attribute("device_ids", list, c10::List<int64_t>(ids));
  parallel.register_attribute("cores_of_models", list, cores_of_models);
  set("dim", dim);
  set("split_size", 0);
  set("traced_rows", rows);
  set("num_workers", 2 * static_cast<int64_t>(ids.size()));
  parallel.register_attribute("holds_tensors", c10::BoolType::get(), holds_tensors);
  define_forward(parallel, models[0], names);
  parallel.eval();
  return parallel;
}

/// The chunk's error, with the chunk and its core named, as a plain exception.
[[noreturn]] void rethrow_named(size_t chunk, size_t count) {
  const auto raise = [&](const std::string& text, bool callers_fault) {
    const int32_t core = runtime::ReplicaSet::take_last_core();
    const std::string where = core >= 0 ? message(" on core ", core) : "";
    const std::string named = message("chunk ", chunk + 1, " of ", count, where, ": ", text);
    if (callers_fault) throw std::invalid_argument(named);
    throw std::runtime_error(named);
  };
  try {
    throw;
  } catch (const std::exception& error) {
    const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
    const std::string text =
        torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
    if (const auto cause = subgraph::take_cause(text)) raise(cause->text, cause->callers_fault);
    raise(text, dynamic_cast<const std::invalid_argument*>(&error) != nullptr);
  }
  throw std::runtime_error(message("chunk ", chunk + 1, " of ", count, ": unknown error"));
}

/// How many rows each chunk has, but for the last.
int64_t rows_of_chunk(const Cut& cut, int64_t rows) {
  if (cut.split_size < 0) {
    throw std::invalid_argument(
        message("split_size=", cut.split_size, ": expected a positive number of rows"));
  }
  const int64_t wished =
      cut.split_size > 0 ? cut.split_size : std::max<int64_t>(1, rows / cut.cores);
  if (cut.traced_rows == 0) return wished;
  if (cut.dim != 0) {
    return cut.split_size > 0 ? std::min(cut.split_size, cut.traced_rows) : cut.traced_rows;
  }
  if (cut.split_size > 0) return wished;
  // Whole inferences: what is cut in between would be padded and computed twice.
  return (wished + cut.traced_rows - 1) / cut.traced_rows * cut.traced_rows;
}

}  // namespace

Module make_parallel(Module model, const std::optional<std::vector<int64_t>>& device_ids,
                     int64_t dim, bool dynamic_batching) {
  Runtime::check_not_forked();
  const std::vector<int64_t> ids = checked_ids(device_ids);
  const std::vector<CoreRun> runs = consecutive_runs(ids);
  const Subgraphs subgraphs = subgraph::find_subgraphs(model._ivalue());
  check_stateless(subgraphs);
  const int64_t rows = dynamic_batching ? traced_rows(model, subgraphs, dim) : 0;

  std::vector<Module> models{model};
  std::vector<Subgraphs> of_models{subgraphs};
  for (size_t i = 1; i < runs.size(); ++i) {
    models.push_back(copy_with_same_tensors(model));
    of_models.push_back(subgraph::find_subgraphs(models.back()._ivalue()));
  }
  Module parallel = assemble(models, runs, ids, dim, rows, holds_tensors(subgraphs));
  // The module itself last: if a load fails, it has not moved and the copies go.
  for (size_t i = models.size(); i-- > 0;) {
    subgraph::set_neuron_cores(of_models[i], runs[i].first, runs[i].count);
  }
  for (const auto& some : of_models) {
    if (!dynamic_batching) subgraph::set_dynamic_batch(some, false);
    if (dim == 0 && rows > 0) subgraph::set_dynamic_batch(some, true);
  }
  return parallel;
}

IValue forward_parallel(const std::vector<Module>& models,
                        const std::vector<int64_t>& cores_of_models, std::vector<IValue> arguments,
                        const std::vector<std::string>& names, const Cut& cut) {
  Runtime::check_not_forked();
  const runtime::ExitGate gate;
  // Copies of the model hold the same tensors, so that one stands for all.
  std::vector<subgraph::GateWish> gates;
  if (cut.holds_tensors) {
    gates = subgraph::request_gates(subgraph::find_held_blocks(models[0]._ivalue()));
  }
  const subgraph::GateScope one_set_of_weights(std::move(gates));
  const Scatter scatter(std::move(arguments), names, cut.dim);
  const int64_t rows = std::max<int64_t>(scatter.rows(), 0);
  const int64_t size = rows_of_chunk(cut, rows);
  const int64_t padded_rows = cut.dim != 0 ? cut.traced_rows : 0;
  const auto count = static_cast<size_t>(std::max<int64_t>(1, (rows + size - 1) / size));

  const auto typical = ChunkTimes::get().of(models[0]);

  // Which model each core belongs to: chunks go round robin over the cores.
  std::vector<size_t> model_of_core;
  for (size_t i = 0; i < models.size(); ++i) {
    model_of_core.insert(model_of_core.end(), static_cast<size_t>(cores_of_models.at(i)), i);
  }
  std::vector<IValue> results(count);
  std::vector<int64_t> rows_of(count);
  const auto* scope = subgraph::GateScope::current();
  const auto compute = [&](size_t chunk) {
    try {
      const subgraph::GateAdoption adoption(scope);
      runtime::ReplicaSet::take_last_core();
      const int64_t begin = static_cast<int64_t>(chunk) * size;
      const int64_t end = std::min(begin + size, rows);
      rows_of[chunk] = end - begin;
      Module model = models[model_of_core.at(chunk % model_of_core.size())];
      const auto start = CondVar::Clock::now();
      results[chunk] = model.forward(scatter.chunk(begin, end, padded_rows));
      typical->note(CondVar::Clock::now() - start);
    } catch (...) {
      rethrow_named(chunk, count);
    }
  };
  const auto run = std::make_shared<ChunkRun>(count, compute);
  const bool brief = typical->below(runtime::kHandOver, static_cast<int64_t>(count));
  const auto workers = brief ? 1 : static_cast<size_t>(std::max<int64_t>(1, cut.workers));
  run->run(Runtime::get().chunk_threads(), workers);
  return gather(results, cut.dim, rows_of, padded_rows);
}

void disable_dynamic_batching(Module& parallel) {
  if (!parallel.hasattr("traced_rows") || !parallel.hasattr("cores_of_models")) {
    throw std::invalid_argument(
        "the module was not made by data_parallel, so it has no dynamic batching to disable");
  }
  parallel.setattr("traced_rows", 0);
  subgraph::set_dynamic_batch(subgraph::find_subgraphs(parallel._ivalue()), false);
}

}  // namespace neuron::parallel

namespace neuron {

torch::jit::Module data_parallel(torch::jit::Module& model,
                                 const std::optional<std::vector<int64_t>>& device_ids, int64_t dim,
                                 bool set_dynamic_batching) {
  return parallel::make_parallel(model, device_ids, dim, set_dynamic_batching);
}

void disable_dynamic_batching(torch::jit::Module& parallel) {
  parallel::disable_dynamic_batching(parallel);
}

}  // namespace neuron
