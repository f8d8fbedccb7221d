#include "runtime/runtime.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <thread>
#include <utility>

#include "common/log.h"
#include "common/message.h"
#include "runtime/host/host_backend.h"

namespace neuron::runtime {
namespace {

std::atomic<Runtime*> process_runtime{nullptr};
std::atomic<bool> forked_child{false};
std::atomic<pid_t> closing_thread{0};  // set at exit
std::atomic<bool> leaving{false};      // exit() has come to us
std::atomic<bool> registered_exit{false};
std::atomic<int32_t> kept_threads{0};  // in exit gates, for ever
thread_local bool exempt_from_exit_gates = false;
Mutex making;

std::unique_ptr<Backend> make_backend(const Settings& settings) {
  if (settings.runtime == RuntimeKind::kNrt) {
    throw std::runtime_error(
        "NEURON_EXT_RUNTIME='nrt' asks for NeuronCores through libnrt, which this version cannot "
        "drive: set it to 'host' or 'auto'");
  }
  return std::make_unique<host::HostBackend>(settings.host_cores);
}

int32_t most_loads_at_once() {
  // Loads wait for memory and page faults more than they compute, so a few more than there are CPUs
  // do no harm, and even one CPU overlaps loads.
  constexpr int32_t kLeast = 4;
  constexpr int32_t kMost = 16;
  return std::clamp(static_cast<int32_t>(std::thread::hardware_concurrency()), kLeast, kMost);
}

}  // namespace

CoreClaim::CoreClaim(Runtime& runtime, int32_t first, int32_t count)
    : runtime_(&runtime), first_(first), count_(count) {}

CoreClaim::CoreClaim(CoreClaim&& other) noexcept
    : runtime_(std::exchange(other.runtime_, nullptr)),
      first_(other.first_),
      count_(other.count_) {}

CoreClaim::~CoreClaim() {
  if (runtime_ == nullptr) return;
  MutexLock lock(runtime_->mutex_);
  for (int32_t i = 0; i < count_; ++i) --runtime_->loads_[first_ + i];
}

void Runtime::check_not_forked() {
  if (!lost_by_fork()) return;
  throw std::runtime_error(
      "this process was forked from one that used NeuronCores, and cores do not pass to a child: "
      "start workers with the 'spawn' method, or fork before the first use of neuron_ext");
}

Runtime& Runtime::get() {
  check_not_forked();
  Runtime* runtime = process_runtime.load(std::memory_order_acquire);
  if (runtime != nullptr) return *runtime;
  MutexLock lock(making);
  runtime = process_runtime.load(std::memory_order_acquire);
  if (runtime == nullptr) {
    const Settings settings = Settings::from_environment();
    auto made = std::make_unique<Runtime>(make_backend(settings), settings);
    pthread_atfork(nullptr, nullptr, [] {
      if (process_runtime.load(std::memory_order_relaxed) != nullptr) forked_child.store(true);
    });
    on_exit(&Runtime::stop_at_exit, nullptr);
    registered_exit.store(true);
    runtime = made.release();
    process_runtime.store(runtime, std::memory_order_release);
  }
  return *runtime;
}

bool Runtime::exists() {
  return process_runtime.load(std::memory_order_acquire) != nullptr;
}

bool Runtime::lost_by_fork() {
  return forked_child.load(std::memory_order_relaxed);
}

Runtime& Runtime::install_for_testing(std::unique_ptr<Backend> backend, const Settings& settings) {
  uninstall_for_testing();
  auto* runtime = new Runtime(std::move(backend), settings);
  process_runtime.store(runtime, std::memory_order_release);
  return *runtime;
}

void Runtime::uninstall_for_testing() {
  delete process_runtime.exchange(nullptr);
}

Runtime::Runtime(std::unique_ptr<Backend> backend, const Settings& settings)
    : settings_(settings),
      backend_(std::move(backend)),
      cores_(find_visible_cores(settings, backend_->core_count(), backend_->name())),
      loads_(cores_.global_indices.size(), 0),
      scheduler_(static_cast<int32_t>(cores_.global_indices.size()),
                 [this](int32_t core) { backend_->adopt_core_thread(global_index(core)); }),
      loader_threads_("neuron-load", most_loads_at_once()),
      chunk_threads_("neuron-chunk", 2 * core_count()) {
  configure_log(settings.log_level, settings.log_location);
  log(LogLevel::kInfo, message("runtime ", backend_->name(), ": cores ",
                               join(cores_.global_indices), " of ", backend_->core_count()));
}

CoreClaim Runtime::claim(const Placement& placement) {
  make_placement(placement.start_nc, placement.nc_count, core_count());
  MutexLock lock(mutex_);
  const int32_t count = placement.count();
  const int32_t first =
      placement.start_nc != -1 ? placement.start_nc : least_used_window(loads_, count);
  for (int32_t i = 0; i < count; ++i) ++loads_[first + i];
  return CoreClaim(*this, first, count);
}

std::vector<CoreStats> Runtime::stats() const {
  std::vector<CoreStats> all;
  for (int32_t core = 0; core < core_count(); ++core) {
    const auto counts = scheduler_.counts(core);
    CoreStats stats;
    stats.index = core;
    stats.global_index = global_index(core);
    stats.cpus = backend_->cpus(stats.global_index);
    stats.executions = counts.executions;
    stats.quarantined = counts.quarantined;
    stats.busy_seconds = std::chrono::duration<double>(counts.busy).count();
    MutexLock lock(mutex_);
    stats.models = loads_[core];
    all.push_back(std::move(stats));
  }
  return all;
}

bool Runtime::close_until(CondVar::Clock::time_point deadline) {
  if (!exists() || lost_by_fork()) return true;
  Runtime* runtime = process_runtime.load();
  closing_thread.store(::gettid());
  // Chunks wait for inferences, so these come last.
  return runtime->loader_threads_.stop_until(deadline) &&
         runtime->chunk_threads_.stop_until(deadline) && runtime->scheduler_.close_until(deadline);
}

bool Runtime::closing() {
  return closing_thread.load(std::memory_order_relaxed) != 0;
}

ExitGate::Exempt::Exempt() {
  exempt_from_exit_gates = true;
}

ExitGate::Exempt::~Exempt() {
  exempt_from_exit_gates = false;
}

void ExitGate::pass() {
  thread_local uint32_t passes = 0;
  if (std::has_single_bit(++passes)) Runtime::register_exit_again();
  const pid_t closing = closing_thread.load(std::memory_order_relaxed);
  if (closing == 0 || closing == ::gettid() || exempt_from_exit_gates) return;
  kept_threads.fetch_add(1);
  for (;;) ::pause();
}

void ExitGate::pass_load() {
  if (leaving.load(std::memory_order_relaxed)) pass();
}

/// exit() calls last what was registered first, and the first inferences make static objects, in
/// oneDNN among others. Registered again after those, we come before them. Never often: exit() has
/// a list of all.
void Runtime::register_exit_again() {
  static std::atomic<uint32_t> asked{0};
  constexpr uint32_t kFirst = 64;
  if (!registered_exit.load(std::memory_order_relaxed)) return;
  const uint32_t number = asked.fetch_add(1, std::memory_order_relaxed);
  if (number < kFirst || std::has_single_bit(number)) on_exit(&Runtime::stop_at_exit, nullptr);
}

/// Native code must not compute while the libraries under it are being torn down; nor may threads
/// that ask for more, which are in TorchScript between two inferences.
void Runtime::stop_at_exit(int status, void* /*unused*/) {
  constexpr auto kPatience = std::chrono::seconds(10);
  constexpr auto kMoment = std::chrono::milliseconds(50);
  constexpr auto kNoTime = std::chrono::milliseconds(0);
  constexpr auto kPeriod = std::chrono::milliseconds(1);
  if (!exists() || lost_by_fork() || leaving.exchange(true)) return;
  const bool prepared = closing();
  if (!close_until(CondVar::Clock::now() + kPatience)) {
    log(LogLevel::kError, "a load or an inference still runs at exit; leaving without it");
  } else {
    // A thread that makes requests comes to a gate within a moment.
    const auto moment = CondVar::Clock::now() + (prepared ? kNoTime : kMoment);
    while (kept_threads.load() == 0) {
      if (CondVar::Clock::now() >= moment) return;
      std::this_thread::sleep_for(kPeriod);
    }
  }
  std::cout.flush();
  std::fflush(nullptr);
  ::_exit(status);
}

}  // namespace neuron::runtime
