#pragma once

#include "runtime/executable.h"

namespace neuron::runtime::host {

/// Compares the bytes that `format` uses with the digests that were saved with them: native code by
/// SHA-256; weights and graph by `quick_checksum`. What this process has checked before is not
/// computed again, unless NEURON_RT_VALIDATE_HASH or NEURON_EXT_NATIVE_CODE=signed asks for it:
/// then all are, by SHA-256.
/// @throws std::runtime_error naming what is damaged.
void check_integrity(const Executable& executable, Format format);

}  // namespace neuron::runtime::host
