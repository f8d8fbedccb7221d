#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace neuron::fuzz {

/// The most that one allocation may ask for. More is refused as if there were no memory: PyTorch's
/// own reader believes any length that a file claims.
constexpr size_t kMostBytes = size_t{256} << 20;

/// Bounds memory, and makes a crash or an input that takes over two minutes tell which input it
/// was.
void install_spies(uint64_t seed);

/// Says what the process works on from here on.
void now_at(const char* kind, uint64_t input);

/// Writes to stderr what that is, and how to run it alone.
void tell_where();

/// The largest request to operator new since `forget_allocations`, in bytes.
size_t largest_allocation();
void forget_allocations();
/// How many requests to operator new were refused so far for their size.
uint64_t refused_allocations();

/// The executable mappings of this process.
size_t executable_mappings();

/// Now, and the most there ever was, in bytes.
size_t resident_memory();
size_t most_resident_memory();

/// Whether code of the library that the states carry has run in this process: its constructor.
bool carried_code_ran();

}  // namespace neuron::fuzz
