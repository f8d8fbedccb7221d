#pragma once

#include <neuron_ext/status.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/mutex.h"
#include "runtime/replica_set.h"
#include "subgraph/state.h"

namespace neuron::subgraph {

/// A subgraph and what becomes of it in this process: unloaded, loading, loaded or failed.
///
/// Thread-safe. At most one load, move or unload of a subgraph is under way at a time; it owns
/// `activity_`. Nothing is locked while a load runs or an inference computes: requests take a
/// reference to the set of replicas and keep it until they end. Loads hold a shared pointer to the
/// subgraph, which may so outlive the module.
class Subgraph : public std::enable_shared_from_this<Subgraph> {
 public:
  using Deadline = std::optional<CondVar::Clock::time_point>;
  class Move;

  /// @param context the placement context that was open where the subgraph was made. It goes before
  /// the placement wished for, and is not saved.
  Subgraph(Decoded decoded, std::optional<Placement> context);

  /// A subgraph of its own over the same executable, with the same wishes, that is not loaded.
  std::shared_ptr<Subgraph> copy() const;

  const runtime::Executable& executable() const { return *executable_; }
  Wishes wishes() const;
  void set_lazy_load(bool enable);
  void set_async_load(bool enable);
  /// @throws std::invalid_argument if the executable cannot be batched.
  void set_dynamic_batch(bool enable);

  /// What `torch.jit.load` triggers: a load now, in the background, or none.
  /// @throws the load's error, if it ran now.
  void load_as_wished();

  /// Computes; loads first if need be, and waits for a load under way.
  /// @throws std::invalid_argument for inputs that do not fit; a load's error, once for each load.
  runtime::Tensors forward(runtime::TensorRefs inputs);

  /// Starts a background load if nothing is loaded, loading or failed.
  void start_loading();

  /// Waits for what is under way. Returns false if the deadline came first.
  /// @throws the error of the last load, if it failed.
  bool wait(Deadline deadline);

  /// Moves in the background. The next forward waits for it.
  void move_in_background(const Placement& placement);

  void unload();

  /// Unloads for good: its module is gone. What is loading is dropped when it comes, by who loads.
  void abandon();

  SubgraphStatus status() const;

 private:
  enum class Activity {
    kNone,
    kLoading,  ///< forward waits for it
    kMoving,   ///< forward goes on where the subgraph is, if it is anywhere
  };
  struct Failure {
    std::string text;
    bool callers_fault;  ///< std::invalid_argument
    bool told;           ///< somebody has had it thrown at them
  };
  using ReplicaSetPtr = std::shared_ptr<runtime::ReplicaSet>;

  Placement effective_placement() const REQUIRES(mutex_);
  void begin(Activity activity) REQUIRES(mutex_);
  void end() REQUIRES(mutex_);
  void load_now() EXCLUDES(mutex_);
  void load_in_background(const Placement& placement, bool is_move) EXCLUDES(mutex_);
  void publish(ReplicaSetPtr replicas, const Placement* moved_to) EXCLUDES(mutex_);
  void fail(Failure failure) EXCLUDES(mutex_);
  ReplicaSetPtr ready_replicas() EXCLUDES(mutex_);
  runtime::Tensors forward_batch(runtime::TensorRefs inputs);
  [[noreturn]] static void raise(const Failure& failure);
  static Failure current_failure();

  const std::shared_ptr<const runtime::Executable> executable_;
  mutable Mutex mutex_;
  CondVar changed_;
  Wishes wishes_ GUARDED_BY(mutex_);
  std::optional<Placement> context_ GUARDED_BY(mutex_);
  Activity activity_ GUARDED_BY(mutex_) = Activity::kNone;
  ReplicaSetPtr replicas_ GUARDED_BY(mutex_);
  std::optional<Failure> failure_ GUARDED_BY(mutex_);
  bool abandoned_ GUARDED_BY(mutex_) = false;
};

/// A move under way: loaded on the new cores, not yet published. Without `commit` all stays as it
/// was.
class Subgraph::Move {
 public:
  /// Waits for other activity, then loads.
  /// @throws what the load throws; the text says where the subgraph still runs.
  Move(std::shared_ptr<Subgraph> subgraph, const Placement& placement);
  ~Move();
  Move(const Move&) = delete;
  Move& operator=(const Move&) = delete;

  /// Does not fail.
  void commit();

 private:
  const std::shared_ptr<Subgraph> subgraph_;
  const Placement placement_;
  ReplicaSetPtr replicas_;
  bool open_ = true;
};

}  // namespace neuron::subgraph
