"""Models, kernels and inputs for tests of buckets. Holds no tests.

Workers import what is here by name.
"""

import torch

import neuron_ext

BUCKETS = (4, 8)


class Pooled(torch.nn.Module):
    """Random whole numbers as weights, so that sums are exact; rows without mask count nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randint(-4, 5, (3, 5)).float(), requires_grad=False)

    def forward(self, x, mask):
        return ((x @ self.weight) * mask.unsqueeze(-1)).sum(1)


def pad_to_buckets(tensors: list[torch.Tensor]):
    """To 4 or 8 rows along dimension 1, whichever is enough, with zeros."""
    padded: list[torch.Tensor] = []
    index = 0
    rows = tensors[0].size(1)
    for i, bucket in enumerate([4, 8]):
        if rows <= bucket:
            index = i
            for tensor in tensors:
                shape: list[int] = tensor.shape
                shape[1] = bucket - rows
                padded.append(torch.cat([tensor, torch.zeros(shape, dtype=tensor.dtype)], 1))
            break
    return padded, torch.tensor([index])


def get_kernel(*_):
    return torch.jit.script(pad_to_buckets)


def make_pooled():
    return Pooled().eval(), {}


def config(kernel=get_kernel, **options):
    return neuron_ext.BucketModelConfig(kernel, **options)


def inputs(rows, batch=2):
    """Whole numbers: x and a mask of that many rows."""
    numbers = torch.arange(batch * rows * 3) % 11 - 5
    x = numbers.float().reshape(batch, rows, 3)
    return x, (torch.arange(batch * rows) % 3 != 1).float().reshape(batch, rows)


def examples(batch=2):
    """Example inputs of each bucket."""
    return [inputs(rows, batch) for rows in BUCKETS]


def seeded_pooled():
    """The model that each call of `make_pooled` makes for a bucket."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        return Pooled().eval()


def subgraphs(module):
    return neuron_ext._subgraphs.find_subgraphs(module)


def tensor_of(subgraph, name):
    """Its bytes of that name; no copy."""
    return subgraph.__getstate__()[0][5][name]


def trace_buckets(func=make_pooled, given=None, configuration=None, **options):
    """A portable module of two buckets."""
    options = {"compiler": "torchscript", **options}
    return neuron_ext.bucket_model_trace(
        func, given or examples(), configuration or config(), **options
    )
