#pragma once

namespace neuron::runtime::host {

/// Has malloc keep up to 128 MB of freed memory at hand in each of its arenas, and serve blocks of
/// up to 32 MB from there. As malloc comes, what an inference frees at its end often goes back to
/// the system, and the next takes a page fault for every 4 KB of it: about 2,000 of them and 3 to
/// 9 % of the time for ResNet-50. Once in a process; what MALLOC_TRIM_THRESHOLD_,
/// MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES say is left as it is. Thread-safe. Without effect where
/// another malloc is in use.
void keep_freed_memory();

}  // namespace neuron::runtime::host
