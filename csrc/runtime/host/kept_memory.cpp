#include "runtime/host/kept_memory.h"

#include <malloc.h>

#include <cstdlib>
#include <string_view>

namespace neuron::runtime::host {
namespace {

constexpr int kKept = 128 << 20;
constexpr int kLargestBlock = 32 << 20;  // glibc takes no more

void set(int parameter, int value, const char* variable, std::string_view tunable) {
  if (std::getenv(variable) != nullptr) return;
  const char* tunables = std::getenv("GLIBC_TUNABLES");
  if (tunables != nullptr && std::string_view(tunables).find(tunable) != std::string_view::npos) {
    return;
  }
  mallopt(parameter, value);
}

}  // namespace

void keep_freed_memory() {
  static const bool once = [] {
    // To set one ends glibc's own adjustment of both.
    set(M_MMAP_THRESHOLD, kLargestBlock, "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold");
    set(M_TRIM_THRESHOLD, kKept, "MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold");
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace neuron::runtime::host
