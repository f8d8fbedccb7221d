"""A model with a cache, its preprocessor, and what both compute in plain PyTorch. Holds no tests.

Workers import what is here by name.
"""

import torch
from bucket_helpers import config, trace_buckets

LENGTHS = (4, 8)


class Cache(torch.nn.Module):
    """Keeps what it is given at the end of a cache of ``length`` places, on whole numbers."""

    def __init__(self, length):
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("keys", torch.full((2, length, 3), -7.0))
        self.weight = torch.nn.Parameter(torch.arange(-4.0, 5.0).reshape(3, 3), requires_grad=False)

    def forward(self, x):
        new = (x @ self.weight).sum(1, keepdim=True)
        keys = torch.cat([self.keys[:, 1:], new], 1)
        self.count += 1
        return {"total": keys.sum(1) + self.count}, self.count, keys


def make_cache(length):
    model = Cache(length).eval()
    return model, {model.keys: 2, model.count: 1}


class Sum(torch.nn.Module):
    def __init__(self, length, shape=(3,), dtype=torch.float32):
        super().__init__()
        self.length = length
        self.register_buffer("sum", torch.full(shape, 9).to(dtype))

    def forward(self, x):
        self.sum += x.sum((0, 1)) * self.length
        return self.sum + 1, self.sum


def make_sum(length, **options):
    model = Sum(length, **options).eval()
    return model, {model.sum: 1}


def pad(tensors: list[torch.Tensor]):
    """To 4 or 8 rows along dimension 1, whichever is enough, with zeros."""
    x = tensors[0]
    padded: list[torch.Tensor] = []
    index = 0
    for i, bucket in enumerate([4, 8]):
        if x.size(1) <= bucket:
            index = i
            zeros = torch.zeros([x.size(0), bucket - x.size(1), x.size(2)], dtype=x.dtype)
            padded.append(torch.cat([x, zeros], 1))
            break
    return padded, torch.tensor([index])


def get_kernel(*_):
    return torch.jit.script(pad)


def state_preprocessor(
    shapes_collection: list[list[list[int]]],
    states: list[torch.Tensor],
    bucket_idx_tensor: torch.Tensor,
) -> list[torch.Tensor]:
    """As in the guide: what stands at the end of each dimension."""
    bucket_idx = torch.ops.aten.Int(bucket_idx_tensor)
    shapes = shapes_collection[bucket_idx]
    sliced_state_tensors = []

    for i in range(len(shapes)):
        expected_shape = shapes[i]
        state_tensor = states[i]
        state_tensor_shape = state_tensor.shape
        for j, npos in enumerate(expected_shape):
            state_tensor_dim_length = state_tensor_shape[j]
            state_tensor = torch.ops.aten.slice(
                state_tensor,
                dim=j,
                start=state_tensor_dim_length - npos,
                end=state_tensor_dim_length,
            )
        sliced_state_tensors.append(state_tensor)

    return sliced_state_tensors


def get_state_preprocessor():
    return torch.jit.script(state_preprocessor)


def initial():
    """The shared buffers: a cache and a count."""
    return [torch.arange(48.0).reshape(2, 8, 3), torch.tensor([10])]


def given(rows, start=0):
    return (torch.arange(rows * 6) % 5 + start - 2).float().reshape(2, rows, 3)


STEPS = [given(rows, i) for i, rows in enumerate((4, 8, 2, 1, 5, 7, 3, 6))]
"""Inputs that go to both buckets in turns."""


class Plain:
    """The same computation on shared buffers, without anything of this package."""

    def __init__(self):
        self.keys, self.count = initial()
        self.model = Cache(8)

    def __call__(self, x):
        length = 4 if x.size(1) <= 4 else 8
        kept = self.keys[:, 8 - length :].clone()
        self.model.keys, self.model.count = kept, self.count.clone()
        out, self.count, keys = self.model(x)
        self.keys = torch.cat([self.keys[:, : 8 - length], keys], 1)
        return out


def shared_config(preprocessor=get_state_preprocessor, buffers=None, lengths=LENGTHS, **options):
    return config(
        get_kernel,
        shared_state_buffer=initial() if buffers is None else buffers,
        shared_state_buffer_preprocessor=preprocessor,
        func_kwargs=[{"length": length} for length in lengths],
        **options,
    )


def trace_cache(func=make_cache, configuration=None, lengths=LENGTHS, **options):
    configuration = configuration or shared_config()
    examples = [torch.zeros(2, length, 3) for length in lengths]
    return trace_buckets(func, examples, configuration, **options)
