#include "spies.h"

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_set_death_callback(void (*callback)());

// Read before anything else runs. A refused allocation is an exception, not the end; libtorch,
// which is not instrumented, and this program's operators agree on malloc and free.
extern "C" [[gnu::visibility("default")]] const char* __asan_default_options() {
  return "allocator_may_return_null=1:max_allocation_size_mb=256:alloc_dealloc_mismatch=0:"
         "quarantine_size_mb=64";
}

// So that what it finds says which input it was: it does not call what ASan calls at the end.
extern "C" [[gnu::visibility("default")]] const char* __ubsan_default_options() {
  return "abort_on_error=1:print_stacktrace=1";
}

// PyTorch's reader forgets an archive whose first record it refuses.
extern "C" [[gnu::visibility("default")]] const char* __lsan_default_suppressions() {
  return "leak:mz_zip_reader_init\nleak:mz_zip_reader_read_central_dir\n";
}
#endif

namespace neuron::fuzz {
namespace {

std::atomic<size_t> largest{0};
std::atomic<uint64_t> refused{0};

uint64_t seed_now = 0;
std::atomic<const char*> kind_now{"start"};
std::atomic<uint64_t> input_now{0};

constexpr unsigned kMostSeconds = 120;

void on_death(int signal) {
  tell_where();
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

void on_alarm(int /*signal*/) {
  static constexpr char kText[] = "\nstate_fuzzer: an input takes more than two minutes";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kText, sizeof(kText) - 1);
  tell_where();
  std::_Exit(EXIT_FAILURE);
}

void* allocate(size_t size) noexcept {
  size_t before = largest.load(std::memory_order_relaxed);
  while (size > before && !largest.compare_exchange_weak(before, size)) {
  }
  if (size > kMostBytes) {
    ++refused;
    return nullptr;
  }
  return std::malloc(size == 0 ? 1 : size);
}

void* allocate_or_throw(size_t size) {
  void* memory = allocate(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void tell_where() {
  char text[200];
  const int size =
      std::snprintf(text, sizeof(text),
                    "\nstate_fuzzer: this was %s %" PRIu64 ": run it alone with --seed %" PRIu64
                    " --only %s:%" PRIu64 "\n",
                    kind_now.load(), input_now.load(), seed_now, kind_now.load(), input_now.load());
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text, static_cast<size_t>(size));
}

void install_spies(uint64_t seed) {
  seed_now = seed;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(&tell_where);
  ::signal(SIGABRT, &on_death);
#else
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) ::signal(signal, &on_death);
  // A sanitizer's shadow memory leaves no room for this; there malloc has a bound of its own.
  std::ifstream statm("/proc/self/statm");
  size_t pages = 0;
  statm >> pages;
  const rlim_t most = pages * static_cast<size_t>(::sysconf(_SC_PAGESIZE)) + 8 * kMostBytes;
  const rlimit limit{most, most};
  ::setrlimit(RLIMIT_AS, &limit);
#endif
  ::signal(SIGALRM, &on_alarm);
}

void now_at(const char* kind, uint64_t input) {
  kind_now = kind;
  input_now = input;
  ::alarm(kMostSeconds);
}

size_t largest_allocation() {
  return largest;
}

void forget_allocations() {
  largest = 0;
}

uint64_t refused_allocations() {
  return refused;
}

size_t executable_mappings() {
  std::ifstream maps("/proc/self/maps");
  size_t count = 0;
  std::string line;
  while (std::getline(maps, line)) {
    const auto permissions = line.find(' ') + 1;
    if (line.size() > permissions + 2 && line[permissions + 2] == 'x') ++count;
  }
  return count;
}

size_t resident_memory() {
  std::ifstream statm("/proc/self/statm");
  size_t all = 0;
  size_t resident = 0;
  statm >> all >> resident;
  return resident * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
}

size_t most_resident_memory() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<size_t>(usage.ru_maxrss) << 10;
}

bool carried_code_ran() {
  return std::getenv("NEURON_FUZZ_CARRIED_CODE_RAN") != nullptr;
}

}  // namespace neuron::fuzz

// Those of the sanitizer end the process where there is no memory, instead of throwing.
void* operator new(size_t size) {
  return neuron::fuzz::allocate_or_throw(size);
}
void* operator new[](size_t size) {
  return neuron::fuzz::allocate_or_throw(size);
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return neuron::fuzz::allocate(size);
}
void* operator new[](size_t size, const std::nothrow_t&) noexcept {
  return neuron::fuzz::allocate(size);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}
