#pragma once

/// Marks what libneuron_ext.so offers to other libraries; everything else is hidden.
#define NEURON_EXT_API __attribute__((visibility("default")))
