"""The placement functions under the name that existing scripts use."""

from neuron_ext.placement import (
    multicore_context,
    neuron_cores_context,
    set_multicore,
    set_neuron_cores,
)

__all__ = ["multicore_context", "neuron_cores_context", "set_multicore", "set_neuron_cores"]
