#include "runtime/host/thread_settings.h"

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "common/log.h"
#include "common/message.h"

// MKL is inside libtorch_cpu on x86; elsewhere the symbol is absent. 0 means "as the process has
// it".
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

namespace neuron::runtime::host {
namespace {

int32_t set_mkl_threads(int32_t threads) {
  return MKL_Set_Num_Threads_Local != nullptr ? MKL_Set_Num_Threads_Local(threads) : 0;
}

}  // namespace

// at::set_num_threads would change the default of every thread that starts later, so the settings
// of this thread alone are changed, below ATen.
CoreScope::CoreScope(int32_t intra_op_threads) : no_autocast_(c10::autocast_dispatch_keyset) {
  // ATen sets a thread's number of threads when that thread first asks for it, or loops in
  // parallel; this has that behind us.
  omp_threads_before_ = at::get_num_threads();
  if (omp_threads_before_ != intra_op_threads) omp_set_num_threads(intra_op_threads);
  mkl_threads_before_ = set_mkl_threads(intra_op_threads);
}

CoreScope::~CoreScope() {
  if (omp_get_max_threads() != omp_threads_before_) omp_set_num_threads(omp_threads_before_);
  set_mkl_threads(mkl_threads_before_);
}

CpuBinding::CpuBinding(const std::vector<int32_t>& cpus) {
  // On a machine with more CPUs than a cpu_set_t has, the first call fails: threads stay unbound.
  cpu_set_t wanted;
  CPU_ZERO(&wanted);
  for (const int32_t cpu : cpus) {
    if (cpu < CPU_SETSIZE) CPU_SET(cpu, &wanted);
  }
  if (sched_getaffinity(0, sizeof(before_), &before_) != 0 || CPU_COUNT(&wanted) == 0 ||
      CPU_EQUAL(&wanted, &before_)) {
    return;
  }
  bound_ = sched_setaffinity(0, sizeof(wanted), &wanted) == 0;
  if (bound_) return;
  static std::atomic_flag told;
  if (told.test_and_set()) return;
  log(LogLevel::kWarning,
      message("the thread that computes for a core cannot be bound to CPUs ", join(cpus), ": ",
              std::strerror(errno), "; it runs where the system puts it"));
}

CpuBinding::~CpuBinding() {
  if (bound_) sched_setaffinity(0, sizeof(before_), &before_);
}

void pin_this_thread(const std::vector<int32_t>& cpus) {
  const int32_t size = cpus.back() + 1;
  cpu_set_t* set = CPU_ALLOC(size);
  const size_t bytes = CPU_ALLOC_SIZE(size);
  CPU_ZERO_S(bytes, set);
  for (const int32_t cpu : cpus) CPU_SET_S(cpu, bytes, set);
  const int result = sched_setaffinity(0, bytes, set);
  CPU_FREE(set);
  if (result != 0) {
    log(LogLevel::kWarning, message("a core's thread cannot be bound to CPUs ", join(cpus), ": ",
                                    std::strerror(errno), "; it runs where the system puts it"));
  }
}

}  // namespace neuron::runtime::host
