#pragma once

#include <ATen/core/Tensor.h>

namespace neuron::runtime {

/// The sum of the bytes read as little-endian 64-bit words, the last one padded with zeros, modulo
/// 2^64. Finds any single changed byte at the speed of memory; it is no protection against intent.
/// @param bytes one-dimensional contiguous uint8 on the CPU.
int64_t quick_checksum(const at::Tensor& bytes);

}  // namespace neuron::runtime
