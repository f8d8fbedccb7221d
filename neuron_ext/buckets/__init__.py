"""Buckets: one module that takes inputs of several shapes, each in a subgraph compiled for it.

`config` checks what the user says, `trace` leads, `workers` compiles in processes, `shared_weights`
keeps one copy of what is equal, and `script_module` writes the TorchScript around it all.
"""

from neuron_ext.buckets.config import BucketModelConfig
from neuron_ext.buckets.trace import bucket_model_trace

__all__ = ["BucketModelConfig", "bucket_model_trace"]
