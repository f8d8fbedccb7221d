#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "common/mutex.h"

namespace neuron::subgraph {

/// Lets requests past held tensors: many that only read them, or one that writes. Who comes first
/// goes first, so neither readers nor writers starve. Thread-safe. Taken by `GateScope`.
class HeldGate {
 public:
  enum class Mode { kShared, kExclusive };

  void enter(Mode mode) EXCLUDES(mutex_);
  void leave(Mode mode) EXCLUDES(mutex_);

  /// For tests: how many wait.
  size_t waiting() const EXCLUDES(mutex_);

 private:
  struct Waiter {
    Mode mode;
    bool admitted = false;
    CondVar turn{};
  };
  bool admits(Mode mode) const REQUIRES(mutex_);
  void admit(Mode mode) REQUIRES(mutex_);

  mutable Mutex mutex_;
  std::deque<Waiter*> queue_ GUARDED_BY(mutex_);
  int64_t readers_ GUARDED_BY(mutex_) = 0;
  bool writing_ GUARDED_BY(mutex_) = false;
};

/// A gate and how somebody wants to pass it.
struct GateWish {
  std::shared_ptr<HeldGate> gate;
  HeldGate::Mode mode;
};

/// Holds gates while it lives, but for those that the thread holds already.
///
/// Lock order: the gates of one scope are taken by address. A thread that opens a scope inside
/// another one may only want what the outer one holds, else two such threads could wait for each
/// other; so whoever makes several requests as one takes all their gates at the outset. No other
/// lock may be held; loads and inferences happen inside.
///
/// Construct and destroy on one thread, innermost first.
class GateScope {
 public:
  /// @throws std::logic_error if the thread holds one of them shared and it is wanted exclusively.
  explicit GateScope(std::vector<GateWish> wishes);
  ~GateScope();
  GateScope(const GateScope&) = delete;
  GateScope& operator=(const GateScope&) = delete;

  /// The innermost scope of this thread, null if there is none: for `GateAdoption`.
  static const GateScope* current();

 private:
  friend class GateAdoption;
  static bool held(const GateWish& wish);
  void leave_all() noexcept;

  std::vector<GateWish> taken_;
  const GateScope* outer_;
};

/// While it lives, this thread counts as holding the gates that `scope` and those around it hold.
/// For a worker that computes a part of a request whose gates the requesting thread has taken: that
/// thread keeps its scope until the worker is done. Null adopts nothing.
class GateAdoption {
 public:
  explicit GateAdoption(const GateScope* scope);
  ~GateAdoption();
  GateAdoption(const GateAdoption&) = delete;
  GateAdoption& operator=(const GateAdoption&) = delete;

 private:
  const GateScope* before_;
};

}  // namespace neuron::subgraph
