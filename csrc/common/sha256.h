#pragma once

#include <cstddef>
#include <string>

namespace neuron {

/// The SHA-256 digest (FIPS 180-4) of `size` bytes, in lower-case hexadecimal. libtorch brings no
/// such function, and a library with one would be another thing that deployments must carry.
std::string sha256_hex(const void* data, size_t size);

}  // namespace neuron
