"""Convolutions that give few pixels, as products of few rows, for TorchInductor to compile.

With channels last, which is how TorchInductor lays out what convolutions read, the pixels are the
rows of a matrix, and a window of one pixel needs no copy of them. Larger windows are copied side by
side first, which pays where there are few.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    get_custom_graph_passes,
    get_hash_for_files,
)

from neuron_ext.compiler import products

# Copying windows takes longer than the products save where there are more of them, and where their
# pixels have fewer values than a cache line. Each pixel of a window is a copy of its own in the
# code.
_MOST_WINDOWS = 64
_LEAST_CHANNELS = 16
_MOST_PIXELS = 25


@contextlib.contextmanager
def convolutions_as_products() -> Iterator[None]:
    """What is compiled meanwhile, with few_rows_products, has products for these convolutions."""
    passes = get_custom_graph_passes(config.post_grad_custom_pre_pass)
    with config.patch(post_grad_custom_pre_pass=[*passes, _AsProducts()]):
        yield


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
        return get_hash_for_files((__file__, products.__file__))


def _replace(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Put a product in the place of a convolution, if it is of those that gain by it."""
    arguments: Any = node.args
    x, weight, bias, padding, stride, dilation, groups, after, *_ = arguments
    before, result = x.meta.get("val"), node.meta.get("val")
    if before is None or result is None or result.dim() != 4 or before.dtype != torch.float32:
        return
    if groups != 1 or after != "none" or any(len(one) != 2 for one in (padding, stride, dilation)):
        return
    # An output is laid out as its node in the graph says.
    if any(user.op == "output" for user in node.users):
        return
    if weight.op != "get_attr" or len(weight.users) != 1:
        return
    module: Any = graph.owning_module
    dense = getattr(module, weight.target).to_dense()
    outputs, channels, *window = dense.shape
    images, _, height, width = result.shape
    rows, inputs = images * height * width, channels * window[0] * window[1]
    copied = window != [1, 1] or any(padding)
    few = rows <= _MOST_WINDOWS and math.prod(window) <= _MOST_PIXELS
    if copied and not (few and channels >= _LEAST_CHANNELS):
        return
    if not products.suits(rows, inputs, outputs):
        return

    call = _Calls(graph, node)
    name = f"{weight.target}_as_matrix"
    matrix = dense.permute(0, 2, 3, 1).reshape(outputs, inputs).contiguous()
    setattr(module, name, torch.ops.mkldnn._reorder_linear_weight(matrix, rows))
    with graph.inserting_before(node):
        packed = graph.get_attr(name)
        packed.meta["val"] = result.new_empty(outputs, inputs)
        pixels = call.pixels(x)
        windows = _windows(call, pixels, window, padding, stride, dilation, (height, width))
        flat = call.reshape(windows, [rows, inputs])
        sums = call.linear(flat, packed, bias, outputs)
        y = call.images(call.reshape(sums, [images, height, width, outputs]))
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    graph.erase_node(weight)
    delattr(module, weight.target)


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

    def __init__(self, graph: torch.fx.Graph, like: torch.fx.Node) -> None:
        self._graph = graph
        self._mode = like.meta["val"].fake_mode

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
        node = self._graph.call_function(target, (x, weight, bias, "none", [], ""))
        with self._mode:
            value = x.meta["val"]
            node.meta["val"] = value.new_empty(value.shape[0], outputs)
        return node

    def _add(self, target: Any, *args: Any) -> torch.fx.Node:
        node = self._graph.call_function(target, args)
        with self._mode:
            node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda one: one.meta["val"]))
        return node
