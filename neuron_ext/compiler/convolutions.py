"""Convolutions that give few pixels, as products of few rows, for TorchInductor to compile.

With channels last, which is how TorchInductor lays out what convolutions read, the pixels are the
rows of a matrix, and a window of one pixel needs no copy of them. Larger windows are copied side by
side first, which pays where there are few.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    get_custom_graph_passes,
    get_hash_for_files,
)

from neuron_ext.compiler import products, winograd

# Copying windows takes longer than the products save where there are more of them, and where their
# pixels have fewer values than a cache line. Each pixel of a window is a copy of its own in the
# code.
_MOST_WINDOWS = 64
_LEAST_CHANNELS = 16
_MOST_PIXELS = 25

_tiled: ContextVar[bool] = ContextVar("tiled_convolutions", default=False)


@contextlib.contextmanager
def convolutions_as_products(*, tiled: bool) -> Iterator[None]:
    """What is compiled meanwhile, with few_rows_products, has products for these convolutions;
    ``tiled`` to have them for those of many pixels, too.
    """
    passes = get_custom_graph_passes(config.post_grad_custom_pre_pass)
    token = _tiled.set(tiled)
    try:
        with config.patch(post_grad_custom_pre_pass=[*passes, _AsProducts()]):
            yield
    finally:
        _tiled.reset(token)


class _AsProducts(CustomGraphPass):
    """Runs when weights are packed, and what follows a convolution is not yet fused with it."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        # The configuration is that of all threads.
        if not products.wanted():
            return
        convolution = torch.ops.mkldnn._convolution_pointwise.default
        for node in graph.find_nodes(op="call_function", target=convolution):
            _replace(graph, node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, products.__file__, winograd.__file__))


def _replace(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Put a product in the place of a convolution, if it is of those that gain by it."""
    arguments: Any = node.args
    x, weight, bias, padding, stride, dilation, groups, after, *_ = arguments
    before, result = x.meta.get("val"), node.meta.get("val")
    if before is None or result is None or result.dim() != 4 or before.dtype != torch.float32:
        return
    if groups != 1 or after != "none":
        return
    # One number is for both dimensions.
    padding, stride, dilation = (list(one) * (2 // len(one)) for one in (padding, stride, dilation))
    # An output is laid out as its node in the graph says.
    if any(user.op == "output" for user in node.users):
        return
    if weight.op != "get_attr" or len(weight.users) != 1:
        return
    sizes = (*before.shape, *result.shape)
    if not all(isinstance(size, int) for size in sizes):
        return
    module: Any = graph.owning_module
    dense = getattr(module, weight.target).to_dense()
    last = node
    with graph.inserting_before(node):
        call = _Calls(graph, node, f"{weight.target}_packed")
        if _few(dense, result, padding):
            y = _product(call, x, dense, bias, (padding, stride, dilation))
        elif _tiled.get() and _tiles(dense, result, stride, dilation):
            last = _rectified(node)
            y = _winograd(call, x, dense, bias, padding, rectified=last is not node)
        else:
            return
    last.replace_all_uses_with(y)
    if last is not node:
        graph.erase_node(last)
    graph.erase_node(node)
    graph.erase_node(weight)
    delattr(module, weight.target)


def _few(weight: torch.Tensor, result: torch.Tensor, padding: list[int]) -> bool:
    """Whether a product of few rows takes less time."""
    outputs, channels, *window = weight.shape
    images, _, height, width = result.shape
    rows, inputs = images * height * width, channels * math.prod(window)
    copied = window != [1, 1] or any(padding)
    few = rows <= _MOST_WINDOWS and math.prod(window) <= _MOST_PIXELS
    if copied and not (few and channels >= _LEAST_CHANNELS):
        return False
    return products.suits(rows, inputs, outputs)


def _tiles(
    weight: torch.Tensor, result: torch.Tensor, stride: list[int], dilation: list[int]
) -> bool:
    """Whether products of transformed tiles take less time."""
    outputs, channels, *window = weight.shape
    images, _, height, width = result.shape
    dense = (window, stride, dilation) == ([3, 3], [1, 1], [1, 1])
    return dense and winograd.suits(images, height, width, channels, outputs)


def _rectified(node: torch.fx.Node) -> torch.fx.Node:
    """The relu that alone follows, or the convolution itself."""
    user, *others = node.users
    relu = user.op == "call_function" and user.target is torch.ops.aten.relu.default
    # An output is laid out as its node in the graph says.
    if others or not relu or any(one.op == "output" for one in user.users):
        return node
    return user


def _product(
    call: _Calls,
    x: torch.fx.Node,
    weight: torch.Tensor,
    bias: torch.fx.Node | None,
    form: tuple[list[int], list[int], list[int]],
) -> torch.fx.Node:
    outputs, channels, *window = weight.shape
    images, _, height, width = call.shape
    rows, inputs = images * height * width, channels * math.prod(window)
    matrix = weight.permute(0, 2, 3, 1).reshape(outputs, inputs).contiguous()
    packed = call.constant(torch.ops.mkldnn._reorder_linear_weight(matrix, rows), [outputs, inputs])
    windows = _windows(call, call.pixels(x), window, *form, (height, width))
    sums = call.linear(call.reshape(windows, [rows, inputs]), packed, bias, outputs)
    return call.images(call.reshape(sums, [images, height, width, outputs]))


def _winograd(
    call: _Calls,
    x: torch.fx.Node,
    weight: torch.Tensor,
    bias: torch.fx.Node | None,
    padding: list[int],
    *,
    rectified: bool,
) -> torch.fx.Node:
    images, outputs, height, width = call.shape
    blocks = winograd.packed(weight)
    packed = call.constant(blocks, list(blocks.shape))
    arguments = (call.pixels(x), packed, bias, tuple(padding), rectified)
    return call.images(
        call.opaque(winograd.convolution, arguments, [images, height, width, outputs])
    )


def _windows(
    call: _Calls,
    pixels: torch.fx.Node,
    window: list[int],
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    size: tuple[int, int],
) -> torch.fx.Node:
    """(images, height, width, values of a window), from (images, height, width, channels)."""
    if any(padding):
        vertical, horizontal = padding
        pixels = call.pad(pixels, [0, 0, horizontal, horizontal, vertical, vertical])
    parts = []
    for i in range(window[0]):
        for j in range(window[1]):
            part = pixels
            for dim, offset in enumerate((i, j)):
                begin = offset * dilation[dim]
                end = begin + (size[dim] - 1) * stride[dim] + 1
                part = call.slice(part, dim + 1, begin, end, stride[dim])
            parts.append(part)
    return call.cat(parts, 3) if len(parts) > 1 else parts[0]


class _Calls:
    """Adds nodes to a graph, with what TorchInductor wants to know of their results."""

    def __init__(self, graph: torch.fx.Graph, like: torch.fx.Node, name: str) -> None:
        self._graph, self._name = graph, name
        self._result: torch.Tensor = like.meta["val"]
        self._mode: Any = like.meta["val"].fake_mode

    @property
    def shape(self) -> torch.Size:
        """(images, channels, height, width) of the convolution's result."""
        return self._result.shape

    def constant(self, value: torch.Tensor, shape: list[int]) -> torch.fx.Node:
        """Weights in a form of their own, as which they have this shape."""
        setattr(self._graph.owning_module, self._name, value)
        node = self._graph.get_attr(self._name)
        node.meta["val"] = self._result.new_empty(shape)
        return node

    def pixels(self, x: torch.fx.Node) -> torch.fx.Node:
        """(images, height, width, channels) of (images, channels, height, width)."""
        node = self._add(torch.ops.aten.permute.default, x, [0, 2, 3, 1])
        with self._mode:
            # As TorchInductor will have it, whatever the graph says.
            node.meta["val"] = node.meta["val"].contiguous()
        return node

    def images(self, x: torch.fx.Node) -> torch.fx.Node:
        """(images, channels, height, width) of (images, height, width, channels)."""
        return self._add(torch.ops.aten.permute.default, x, [0, 3, 1, 2])

    def reshape(self, x: torch.fx.Node, shape: list[int]) -> torch.fx.Node:
        return self._add(torch.ops.aten.reshape.default, x, shape)

    def pad(self, x: torch.fx.Node, widths: list[int]) -> torch.fx.Node:
        return self._add(torch.ops.aten.constant_pad_nd.default, x, widths, 0.0)

    def slice(self, x: torch.fx.Node, dim: int, begin: int, end: int, step: int) -> torch.fx.Node:
        if (begin, end, step) == (0, x.meta["val"].shape[dim], 1):
            return x
        return self._add(torch.ops.aten.slice.Tensor, x, dim, begin, end, step)

    def cat(self, parts: list[torch.fx.Node], dim: int) -> torch.fx.Node:
        return self._add(torch.ops.aten.cat.default, parts, dim)

    def linear(
        self, x: torch.fx.Node, weight: torch.fx.Node, bias: torch.fx.Node | None, outputs: int
    ) -> torch.fx.Node:
        target = torch.ops.mkldnn._linear_pointwise.default
        arguments: tuple[Any, ...] = (x, weight, bias, "none", [], "")
        return self.opaque(target, arguments, [x.meta["val"].shape[0], outputs])

    def opaque(self, target: Any, arguments: tuple[Any, ...], shape: list[int]) -> torch.fx.Node:
        """A call whose result has this shape, which is not looked into."""
        node = self._graph.call_function(target, arguments)
        node.meta["val"] = self._result.new_empty(shape)
        return node

    def _add(self, target: Any, *args: Any) -> torch.fx.Node:
        node = self._graph.call_function(target, args)
        with self._mode:
            node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda one: one.meta["val"]))
        return node
