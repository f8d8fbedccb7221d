"""``dynamic_batch``: batches of any size through a module that was traced for one.

Behaves as the "Trace" API page of the Neuron documentation says.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from neuron_ext._library import ops
from neuron_ext._subgraphs import holder

Module = TypeVar("Module", bound=torch.nn.Module)


def dynamic_batch(trace: Module, enable: bool = True) -> Module:
    """Sets whether ``trace`` takes batches of any size, and returns ``trace`` itself.

    A batch is cut along dimension 0 into chunks of the size that was traced; the last one is
    padded, and what the padding gives never leaves. The replicas share the chunks of one call. An
    empty batch gives empty outputs. Inputs of the traced size run as without it. The flag is saved
    with the module. Thread-safe.

    Args:
        trace: a module with traced subgraphs, all of which have the batch as dimension 0 of every
            input and output; one without subgraphs is left alone.
        enable: on or off.

    Raises:
        ValueError: an input or output has no such dimension, or an input is updated in place; the
            text names it. Nothing has changed then. When called, a module refuses inputs that
            differ in another dimension, or from each other in dimension 0; out of a ScriptModule
            TorchScript makes a ``RuntimeError`` of that, with the same text.
    """
    ops.set_dynamic_batch(holder(trace), bool(enable))
    return trace
