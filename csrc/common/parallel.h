#pragma once

#include <cstddef>
#include <functional>

namespace neuron {

/// Calls `part(begin, end)` for parts that make up 0 .. size-1, on a few threads at once where
/// `size` (bytes, say) is large enough to pay for them, and returns when all have returned. `part`
/// must not throw, and may be called from several threads.
void in_parallel(size_t size, const std::function<void(size_t begin, size_t end)>& part);

}  // namespace neuron
