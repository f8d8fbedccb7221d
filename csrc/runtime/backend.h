#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/executable.h"

namespace neuron::runtime {

/// An executable loaded on one core, as its backend keeps it. Destroying it unloads it.
class Replica {
 public:
  virtual ~Replica() = default;

  /// Computes. Inputs fit the executable's specification and are contiguous. Called by one thread
  /// at a time; leaves that thread's settings as they were.
  /// @throws std::exception of whatever went wrong.
  virtual Tensors execute(TensorRefs inputs) = 0;
};

/// A kind of device with cores. Cores here are counted on the whole machine ("global").
/// All methods are thread-safe, and may be called from any thread.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;
  virtual int32_t core_count() const = 0;

  /// The CPUs that the core computes on; empty where it is no CPU that computes.
  virtual std::vector<int32_t> cpus(int32_t core) const = 0;

  /// Loads onto one core.
  /// @throws std::runtime_error if this machine cannot run the executable: what it needs, what is
  /// here, what to do.
  virtual std::unique_ptr<Replica> load(const std::shared_ptr<const Executable>& executable,
                                        int32_t core) = 0;

  /// Sets up the thread that will compute for the core and nothing else. Does not fail.
  virtual void adopt_core_thread(int32_t core) = 0;

  /// Whether an inference may be computed by the thread that asks for it, sparing the hand-over to
  /// the core's own. The replica then sees to its thread settings itself.
  virtual bool may_borrow_thread(int32_t core) const = 0;

  /// Runs `work` on the calling thread as the core's own thread would run it, and leaves the thread
  /// as it was, also when `work` throws. Where `may_borrow_thread`.
  virtual void run_borrowed(int32_t core, c10::function_ref<void()> work) = 0;
};

}  // namespace neuron::runtime
