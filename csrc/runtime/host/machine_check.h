#pragma once

#include "runtime/executable.h"

namespace neuron::runtime::host {

/// Decides what of the executable runs on this machine: its native code, or its portable graph
/// where the native code may not run or could not.
/// @throws std::runtime_error if neither can: what the file needs, what is here, what to do.
Format choose_format(const Executable& executable);

}  // namespace neuron::runtime::host
