#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace neuron::runtime::host {

/// Maps a shared library out of memory, without leaving a file behind, and returns its handle for
/// `dlsym`. The same content, told by `sha256`, is mapped once in a process.
///
/// It stays for the life of the process: OpenMP or thread-local destructors may still point into
/// it.
///
/// @param code one-dimensional uint8, of which `sha256` is known to be the digest.
/// @throws std::runtime_error with the system's or the dynamic linker's reason. Thread-safe.
void* map_native_library(const at::Tensor& code, const std::string& sha256);

}  // namespace neuron::runtime::host
