#pragma once

namespace neuron::runtime::host {

/// Has the OpenMP regions of a mapped library run without a team where they would have a team of
/// one: setting that up and taking it down costs a system call for each loop of the code. Only
/// calls through the library's own procedure linkage table are led elsewhere. Where that table is
/// read-only or of an unknown kind nothing changes.
/// @param library a handle from `dlopen`. To be called before the library runs.
void serve_parallel_regions(void* library);

}  // namespace neuron::runtime::host
