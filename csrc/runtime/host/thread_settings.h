#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <sched.h>

#include <cstdint>
#include <vector>

namespace neuron::runtime::host {

/// Puts the calling thread under a core's settings while it lives, and back under its own after:
/// the number of intra-op threads, no gradients, no autocast. What the caller has set for itself
/// does not leak into the computation, nor the core's settings out of it.
class CoreScope {
 public:
  explicit CoreScope(int32_t intra_op_threads);
  ~CoreScope();
  CoreScope(const CoreScope&) = delete;
  CoreScope& operator=(const CoreScope&) = delete;

 private:
  at::NoGradGuard no_grad_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_;
  int32_t omp_threads_before_;
  int32_t mkl_threads_before_;
};

/// Binds the calling thread to `cpus` while it lives, and lets it go back to the CPUs it had after.
/// Where the system refuses, that is logged once in a process, and threads stay where they are.
class CpuBinding {
 public:
  explicit CpuBinding(const std::vector<int32_t>& cpus);
  ~CpuBinding();
  CpuBinding(const CpuBinding&) = delete;
  CpuBinding& operator=(const CpuBinding&) = delete;

 private:
  cpu_set_t before_;
  bool bound_ = false;
};

/// Binds the calling thread, and the threads it will make, to `cpus`. Where the system refuses, a
/// warning is logged and the thread stays where it was.
void pin_this_thread(const std::vector<int32_t>& cpus);

}  // namespace neuron::runtime::host
