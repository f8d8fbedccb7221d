#include "subgraph/subgraph.h"

#include <c10/util/Exception.h>

#include <stdexcept>
#include <utility>

#include "common/message.h"
#include "subgraph/batch.h"
#include "subgraph/input_check.h"

namespace neuron::subgraph {

using runtime::ReplicaSet;
using runtime::Runtime;

Subgraph::Subgraph(Decoded decoded, std::optional<Placement> context)
    : executable_(std::move(decoded.executable)),
      wishes_(decoded.wishes),
      context_(std::move(context)) {}

std::shared_ptr<Subgraph> Subgraph::copy() const {
  return std::make_shared<Subgraph>(Decoded{executable_, wishes()}, std::nullopt);
}

Wishes Subgraph::wishes() const {
  MutexLock lock(mutex_);
  return wishes_;
}

void Subgraph::set_lazy_load(bool enable) {
  MutexLock lock(mutex_);
  wishes_.lazy_load = enable;
}

void Subgraph::set_async_load(bool enable) {
  MutexLock lock(mutex_);
  wishes_.async_load = enable;
}

void Subgraph::set_dynamic_batch(bool enable) {
  if (enable) check_batchable(*executable_);
  MutexLock lock(mutex_);
  wishes_.dynamic_batch = enable;
}

Placement Subgraph::effective_placement() const {
  return context_.value_or(wishes_.placement);
}

void Subgraph::begin(Activity activity) {
  while (activity_ != Activity::kNone) changed_.wait(mutex_);
  activity_ = activity;
}

void Subgraph::end() {
  activity_ = Activity::kNone;
  changed_.notify_all();
}

void Subgraph::raise(const Failure& failure) {
  if (failure.callers_fault) throw std::invalid_argument(failure.text);
  throw std::runtime_error(failure.text);
}

/// Of the exception being handled.
Subgraph::Failure Subgraph::current_failure() {
  try {
    throw;
  } catch (const std::invalid_argument& error) {
    return {error.what(), true, false};
  } catch (const c10::Error& error) {
    return {error.what_without_backtrace(), false, false};
  } catch (const std::exception& error) {
    return {error.what(), false, false};
  } catch (...) {
    return {"unknown error", false, false};
  }
}

void Subgraph::publish(ReplicaSetPtr replicas, const Placement* moved_to) {
  // The set that goes leaves the lock before it unloads.
  MutexLock lock(mutex_);
  if (abandoned_) return end();
  replicas_.swap(replicas);
  failure_.reset();
  if (moved_to != nullptr) {
    wishes_.placement = *moved_to;
    context_.reset();
  }
  end();
}

void Subgraph::fail(Failure failure) {
  MutexLock lock(mutex_);
  failure_ = std::move(failure);
  end();
}

/// Loads on this thread, as the owner of `activity_`.
void Subgraph::load_now() {
  Placement placement;
  {
    MutexLock lock(mutex_);
    placement = effective_placement();
  }
  try {
    publish(ReplicaSet::load(Runtime::get(), executable_, placement), nullptr);
  } catch (...) {
    Failure failure = current_failure();
    failure.told = true;
    fail(failure);
    raise(failure);
  }
}

/// Loads on a loader thread, as the owner of `activity_`.
void Subgraph::load_in_background(const Placement& placement, bool is_move) {
  try {
    Runtime& runtime = Runtime::get();
    runtime.loader_threads().submit([self = shared_from_this(), &runtime, placement, is_move] {
      try {
        self->publish(ReplicaSet::load(runtime, self->executable_, placement),
                      is_move ? &placement : nullptr);
      } catch (...) {
        self->fail(current_failure());
      }
    });
  } catch (...) {
    MutexLock lock(mutex_);
    end();
    throw;
  }
}

void Subgraph::load_as_wished() {
  Placement placement;
  bool background = false;
  {
    MutexLock lock(mutex_);
    if (wishes_.lazy_load) return;
    begin(Activity::kLoading);
    background = wishes_.async_load;
    placement = effective_placement();
  }
  if (background) {
    load_in_background(placement, false);
  } else {
    load_now();
  }
}

void Subgraph::start_loading() {
  Placement placement;
  {
    MutexLock lock(mutex_);
    if (activity_ != Activity::kNone || replicas_ != nullptr || failure_.has_value()) return;
    begin(Activity::kLoading);
    placement = effective_placement();
  }
  load_in_background(placement, false);
}

bool Subgraph::wait(Deadline deadline) {
  MutexLock lock(mutex_);
  while (activity_ != Activity::kNone) {
    if (!deadline) {
      changed_.wait(mutex_);
      continue;
    }
    if (CondVar::Clock::now() >= *deadline) return false;
    changed_.wait_until(mutex_, *deadline);
  }
  if (failure_) {
    failure_->told = true;
    raise(*failure_);
  }
  return true;
}

/// The replicas to compute on. Tells of a load that failed in the background, and after that tries
/// again.
Subgraph::ReplicaSetPtr Subgraph::ready_replicas() {
  for (;;) {
    {
      MutexLock lock(mutex_);
      while (activity_ == Activity::kLoading ||
             (activity_ == Activity::kMoving && replicas_ == nullptr)) {
        changed_.wait(mutex_);
      }
      if (failure_ && !failure_->told) {
        failure_->told = true;
        raise(*failure_);
      }
      if (replicas_ != nullptr) return replicas_;
      begin(Activity::kLoading);
    }
    load_now();
  }
}

runtime::Tensors Subgraph::forward(runtime::TensorRefs inputs) {
  if (!inputs_fit(*executable_, inputs)) {
    if (wishes().dynamic_batch) return forward_batch(inputs);
    check_inputs(*executable_, inputs);
  }
  const ReplicaSetPtr replicas = ready_replicas();
  bool contiguous = true;
  for (const auto& input : inputs) contiguous = contiguous && input.is_contiguous();
  if (contiguous) return replicas->execute(inputs);

  runtime::Tensors dense;
  for (const auto& input : inputs) dense.push_back(input.contiguous());
  auto outputs = replicas->execute(dense);
  for (const int64_t index : executable_->mutated_inputs) {
    if (!inputs[index].is_contiguous()) inputs[index].copy_(dense[index]);
  }
  return outputs;
}

/// The replicas share the chunks of one call.
runtime::Tensors Subgraph::forward_batch(runtime::TensorRefs inputs) {
  check_batchable(*executable_);  // a file may claim the flag for anything
  const int64_t rows = check_batch(*executable_, inputs);
  const int64_t size = chunk_rows(*executable_);
  const auto count = static_cast<size_t>((rows + size - 1) / size);
  const ReplicaSetPtr replicas = ready_replicas();
  const auto outputs = replicas->execute_all(count, [&](size_t chunk) {
    return chunk_of(*executable_, inputs, static_cast<int64_t>(chunk) * size);
  });
  return join_chunks(*executable_, outputs, rows);
}

void Subgraph::move_in_background(const Placement& placement) {
  {
    MutexLock lock(mutex_);
    begin(Activity::kLoading);
  }
  load_in_background(placement, true);
}

void Subgraph::unload() {
  ReplicaSetPtr replicas;  // leaves the lock before it unloads
  MutexLock lock(mutex_);
  begin(Activity::kMoving);
  replicas.swap(replicas_);
  failure_.reset();
  end();
}

void Subgraph::abandon() {
  ReplicaSetPtr replicas;  // leaves the lock before it unloads
  MutexLock lock(mutex_);
  abandoned_ = true;
  replicas.swap(replicas_);
}

SubgraphStatus Subgraph::status() const {
  MutexLock lock(mutex_);
  SubgraphStatus status;
  status.name = executable_->name;
  const Placement placement = effective_placement();
  status.start_nc = placement.start_nc;
  status.nc_count = placement.nc_count;
  status.lazy_load = wishes_.lazy_load;
  status.async_load = wishes_.async_load;
  status.dynamic_batch = wishes_.dynamic_batch;
  if (failure_) status.error = failure_->text;
  if (replicas_ != nullptr) {
    status.cores = replicas_->cores();
    status.executions = replicas_->executions();
    status.quarantined = replicas_->quarantined();
  }
  if (activity_ == Activity::kLoading) {
    status.state = "loading";
  } else if (replicas_ != nullptr) {
    status.state = "loaded";
  } else if (activity_ == Activity::kMoving) {
    status.state = "loading";
  } else {
    status.state = failure_ ? "failed" : "unloaded";
  }
  return status;
}

Subgraph::Move::Move(std::shared_ptr<Subgraph> subgraph, const Placement& placement)
    : subgraph_(std::move(subgraph)), placement_(placement) {
  ReplicaSetPtr before;
  {
    MutexLock lock(subgraph_->mutex_);
    subgraph_->begin(Activity::kMoving);
    before = subgraph_->replicas_;
  }
  try {
    replicas_ = ReplicaSet::load(Runtime::get(), subgraph_->executable_, placement);
  } catch (...) {
    Failure failure = current_failure();
    failure.text =
        message(failure.text, " (subgraph '", subgraph_->executable_->name, "' was to move to ",
                to_string(placement), "; it ",
                before != nullptr ? message("still runs on cores ", join(before->cores()))
                                  : "is not loaded",
                ")");
    failure.told = true;
    subgraph_->fail(failure);
    raise(failure);
  }
}

Subgraph::Move::~Move() {
  if (!open_) return;
  MutexLock lock(subgraph_->mutex_);
  subgraph_->end();
}

void Subgraph::Move::commit() {
  open_ = false;
  subgraph_->publish(std::move(replicas_), &placement_);
}

}  // namespace neuron::subgraph
