#pragma once

#include <cstdint>
#include <optional>

#include "placement/placement.h"

namespace neuron {

/// The stack of placement contexts of the calling thread. Other threads never see it.

/// Opens a context and returns its token. Does not check the placement.
int64_t enter_placement_context(Placement placement);

/// Closes the context of `token`; others stay open.
/// @throws std::invalid_argument if `token` is not open on this thread.
void exit_placement_context(int64_t token);

/// The innermost context, if any.
std::optional<Placement> current_placement_context();

}  // namespace neuron
