// The native code of the fuzzer's states: a library that tells when it is mapped, and is nothing
// that AOTInductor made.
#include <cstdlib>

namespace {

[[gnu::constructor]] void tell() {
  ::setenv("NEURON_FUZZ_CARRIED_CODE_RAN", "1", 1);
}

}  // namespace
