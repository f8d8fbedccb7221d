"""Models cut into subgraphs and CPU parts, and the report of what a subgraph can hold.

``PartitionerConfig`` and ``analyze`` are the public names; ``trace`` uses `stitch`. The way of a
partition: `exported` makes a graph of func, `support` says what a subgraph can hold, `cut` makes
parts, `cpu_part` writes those that stay on the CPU, and `stitch` compiles the others and joins all.
"""

from neuron_ext.partition.config import PartitionerConfig
from neuron_ext.partition.report import analyze

__all__ = ["PartitionerConfig", "analyze"]
