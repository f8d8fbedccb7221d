"""Convolutions with windows of 3x3 that give many pixels, for TorchInductor to compile.

Winograd's filtering gives 2x2 results of such a window with 16 multiplications instead of 36, as
F(2x2, 3x3) in A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks"
(arXiv:1509.09308). Tiles of 4x4 pixels, and the weights, are transformed as they are needed, so
that weights take no more memory; 16 products of tiles with weights follow, and are transformed to
pixels while the caches hold them. Rounding errors are like those of oneDNN's convolutions, but are
relative to the largest value of a tile: a result can be NaN for a neighbour that is infinite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen import cpp
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import GemmBlocking
from torch._inductor.cpu_vec_isa import VecAVX512, pick_vec_isa
from torch._inductor.utils import parallel_num_threads

from neuron_ext.compiler.products import FewRowsGemm

# Outputs that are computed at a time, with as many tiles as make full use of registers.
_WIDTH, _MOST_ROWS = 32, 14
# What the second-level cache holds of tiles' values, and of transformed weights: all of them, or
# those of one block of outputs, some inputs at a time.
_MOST_VALUES = 1 << 18
_MOST_TILES = 56
_PART = 128
# With fewer, or with so many channels that few tiles fit, transforming takes longer than it saves.
_LEAST_CHANNELS, _MOST_CHANNELS = 32, 512
_LEAST_TILES = 16

_CODE = r"""
{{template.header().getvalue()}}
{{gemm.codegen_define(kernel)}}
{%- set name = kernel.kernel_name %}
using {{name}}_vec = at::vec::Vectorized<float>;

// (inputs, 9, {{width}}) to (16, inputs, {{width}})
inline void {{name}}_weights(const float* raw, float* weights) {
    using Vec = {{name}}_vec;
    const Vec half(0.5f);
    for (int64_t c = 0; c < {{part}}; ++c) {
        for (int64_t n = 0; n < {{width}}; n += Vec::size()) {
            Vec columns[4][3];
            #pragma GCC unroll 3
            for (int64_t j = 0; j < 3; ++j) {
                const float* from = raw + (c * 9 + j) * {{width}} + n;
                const auto first = Vec::loadu(from);
                const auto middle = Vec::loadu(from + {{3 * width}}) * half;
                const auto last = Vec::loadu(from + {{6 * width}});
                const auto ends = (first + last) * half;
                columns[0][j] = first;
                columns[1][j] = ends + middle;
                columns[2][j] = ends - middle;
                columns[3][j] = last;
            }
            #pragma GCC unroll 4
            for (int64_t i = 0; i < 4; ++i) {
                float* to = weights + (i * {{4 * part}} + c) * {{width}} + n;
                const auto middle = columns[i][1] * half;
                const auto ends = (columns[i][0] + columns[i][2]) * half;
                columns[i][0].store(to);
                (ends + middle).store(to + {{part * width}});
                (ends - middle).store(to + {{2 * part * width}});
                columns[i][2].store(to + {{3 * part * width}});
            }
        }
    }
}

// Pixels of one tile, whose first has this place in the padded image, to (16, tiles, channels).
inline void {{name}}_tile(const float* image, int64_t row, int64_t column, float* tile) {
    using Vec = {{name}}_vec;
    alignas(64) static const float zeros[{{channels}}] = {};
    const float* pixels[4][4];
    for (int64_t i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < 4; ++j) {
            const int64_t y = row + i - {{padding[0]}}, x = column + j - {{padding[1]}};
            const bool inside = y >= 0 && y < {{height}} && x >= 0 && x < {{width_in}};
            pixels[i][j] = inside ? image + (y * {{width_in}} + x) * {{channels}} : zeros;
        }
    }
    for (int64_t c = 0; c < {{channels}}; c += Vec::size()) {
        Vec rows[4][4];
        #pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j) {
            const auto first = Vec::loadu(pixels[0][j] + c), second = Vec::loadu(pixels[1][j] + c);
            const auto third = Vec::loadu(pixels[2][j] + c), fourth = Vec::loadu(pixels[3][j] + c);
            rows[0][j] = first - third;
            rows[1][j] = second + third;
            rows[2][j] = third - second;
            rows[3][j] = second - fourth;
        }
        #pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) {
            float* to = tile + i * {{4 * tiles * channels}} + c;
            (rows[i][0] - rows[i][2]).store(to);
            (rows[i][1] + rows[i][2]).store(to + {{tiles * channels}});
            (rows[i][2] - rows[i][1]).store(to + {{2 * tiles * channels}});
            (rows[i][1] - rows[i][3]).store(to + {{3 * tiles * channels}});
        }
    }
}

// Sums of one tile, (16, tiles, {{width}}), to as many of its 2x2 pixels as there are.
inline void {{name}}_pixels(
    const float* sums, const float* bias, float* pixels, int64_t rows, int64_t columns
) {
    using Vec = {{name}}_vec;
    for (int64_t n = 0; n < {{width}}; n += Vec::size()) {
        Vec halves[2][4];
        #pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j) {
            const float* from = sums + j * {{tiles * width}} + n;
            const auto second = Vec::loadu(from + {{4 * tiles * width}});
            const auto third = Vec::loadu(from + {{8 * tiles * width}});
            halves[0][j] = Vec::loadu(from) + second + third;
            halves[1][j] = second - third - Vec::loadu(from + {{12 * tiles * width}});
        }
        const auto add = {% if biased %}Vec::loadu(bias + n){% else %}Vec(0.0f){% endif %};
        #pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i) {
            if (i == rows) {
                break;
            }
            float* to = pixels + i * {{columns * outputs}} + n;
            const auto* half = halves[i];
            auto left = half[0] + half[1] + half[2] + add;
            auto right = half[1] - half[2] - half[3] + add;
{%- if rectified %}
            left = at::vec::clamp_min(left, Vec(0.0f));
            right = at::vec::clamp_min(right, Vec(0.0f));
{%- endif %}
            left.store(to);
            if (columns > 1) {
                right.store(to + {{outputs}});
            }
        }
    }
}

extern "C"
{{kernel.def_kernel(inputs=inputs, outputs={"Y": Y}, aliases=aliases)}}
{
    {{kernel.maybe_codegen_profile()}}
    // Of each thread: tiles, sums{% if not whole %}, weights{% endif %}. Aligned to cache lines.
    constexpr int64_t tiles_size = {{16 * tiles * channels}}, sums_size = {{16 * tiles * width}};
    constexpr int64_t weights_size = {{16 * part * (outputs if whole else width)}};
    constexpr int64_t thread_size =
        tiles_size + sums_size{% if not whole %} + weights_size{% endif %};
    const std::unique_ptr<float[]> memory(
        new float[{{threads}} * thread_size{% if whole %} + weights_size{% endif %} + 16]);
    float* const aligned = reinterpret_cast<float*>(
        (reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    const float* const x = &{{kernel.index(X, [0, 0, 0, 0])}};
    float* const y = &{{kernel.index(Y, [0, 0, 0, 0])}};
{%- if threads > 1 %}
    #pragma omp parallel num_threads({{threads}})
{%- endif %}
    {
{%- if threads > 1 %}
        float* const values = aligned + omp_get_thread_num() * thread_size;
{%- else %}
        float* const values = aligned;
{%- endif %}
        float* const sums = values + tiles_size;
{%- if whole %}
        float* const all_weights = aligned + {{threads}} * thread_size;
{%- if threads > 1 %}
        #pragma omp for schedule(static)
{%- endif %}
        for (int64_t block = 0; block < {{outputs // width}}; ++block) {
            {{name}}_weights(
                W + block * {{9 * channels * width}}, all_weights + block * {{16 * part * width}});
        }
{%- else %}
        float* const weights = sums + sums_size;
{%- endif %}
{%- if threads > 1 %}
        #pragma omp for schedule(static)
{%- endif %}
        for (int64_t begin = 0; begin < {{total}}; begin += {{tiles}}) {
            // The last take some of those before with them, to be as many.
            const int64_t first = std::min<int64_t>(begin, {{total - tiles}});
            for (int64_t t = 0; t < {{tiles}}; ++t) {
                const int64_t image = (first + t) / {{of_image}}, tile = (first + t) % {{of_image}};
                {{name}}_tile(
                    x + image * {{height * width_in * channels}},
                    tile / {{of_row}} * 2, tile % {{of_row}} * 2, values + t * {{channels}});
            }
            for (int64_t n = 0; n < {{outputs}}; n += {{width}}) {
                for (int64_t k = 0; k < {{channels}}; k += {{part}}) {
{%- if whole %}
                    const float* const weights = all_weights + n * {{16 * part}};
{%- else %}
                    {{name}}_weights(W + (n * {{channels}} + k * {{width}}) * 9, weights);
{%- endif %}
                    for (int64_t p = 0; p < 16; ++p) {
                        const float* const a = values + p * {{tiles * channels}} + k;
                        const float* const b = weights + p * {{part * width}};
                        float* const c = sums + p * {{tiles * width}};
                        if (k == 0) {
                            {{gemm.name}}<false>(a, b, c, {{products}});
                        } else {
                            {{gemm.name}}<true>(a, b, c, {{products}});
                        }
                    }
                }
                for (int64_t t = begin - first; t < {{tiles}}; ++t) {
                    const int64_t tile = (first + t) % {{of_image}};
                    const int64_t row = tile / {{of_row}} * 2, column = tile % {{of_row}} * 2;
                    const int64_t line = (first + t) / {{of_image}} * {{rows}} + row;
                    {{name}}_pixels(
                        sums + t * {{width}},
                        {% if biased %}B + n{% else %}nullptr{% endif %},
                        y + (line * {{columns}} + column) * {{outputs}} + n,
                        std::min<int64_t>(2, {{rows}} - row),
                        std::min<int64_t>(2, {{columns}} - column));
                }
            }
        }
    }
}
"""


class _Sizes:
    """How tiles, inputs and outputs are cut up."""

    def __init__(self, images: int, rows: int, columns: int, channels: int, outputs: int) -> None:
        self.of_row = math.ceil(columns / 2)
        self.of_image = math.ceil(rows / 2) * self.of_row
        self.total = images * self.of_image
        most = max(1, min(_MOST_TILES, _MOST_VALUES // (16 * channels)))
        self.tiles = math.ceil(self.total / math.ceil(self.total / most))
        self.whole = 16 * channels * outputs <= _MOST_VALUES
        self.part = channels if self.whole or channels % _PART else _PART


def suits(images: int, rows: int, columns: int, channels: int, outputs: int) -> bool:
    """Whether a convolution with as many results gains, if its windows are 3x3 without gaps."""
    return (
        channels % 16 == 0
        and outputs % _WIDTH == 0
        and min(channels, outputs) >= _LEAST_CHANNELS
        and channels <= _MOST_CHANNELS
        and images * math.ceil(rows / 2) * math.ceil(columns / 2) >= _LEAST_TILES
        and isinstance(pick_vec_isa(), VecAVX512)
    )


def packed(weight: torch.Tensor) -> torch.Tensor:
    """(outputs, channels, 3, 3) as `convolution` takes it: blocks of outputs, side by side."""
    outputs, channels, *_ = weight.shape
    blocks = weight.reshape(outputs // _WIDTH, _WIDTH, channels, 9)
    return blocks.permute(0, 2, 3, 1).contiguous()


def convolution(x: Any, weight: Any, bias: Any, padding: tuple[int, int], rectified: bool) -> Any:
    """What TorchInductor calls for a node of the graph with this as its target.

    ``x`` is (images, height, width, channels), and the result (images, rows, columns, outputs), of
    which those below 0 are 0 if it is to be ``rectified``.
    """
    _install()
    x, weight = (ir.ExternKernel.require_contiguous(one) for one in (x, weight))
    images, height, width, _ = map(int, x.get_size())
    size = [
        images,
        height + 2 * padding[0] - 2,
        width + 2 * padding[1] - 2,
        int(weight.get_size()[0]) * _WIDTH,
    ]
    nodes = [x, weight]
    if bias is not None:
        nodes.append(ir.ExternKernel.require_contiguous(bias))
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), size)
    template: Any = _Template(nodes, layout, padding, rectified)
    return template.generate().output_node()


convolution._inductor_lowering_function = True  # type: ignore[attr-defined]


@functools.cache
def _install() -> None:
    """Wrap, for good, what TorchInductor asks before it fuses what follows with a template: this
    one stores its results itself. To wrap twice does no harm.
    """
    module: Any = cpp
    original: Callable[..., tuple[bool, bool]] = module.template_fusion_with_epilogues_supported

    @functools.wraps(original)
    def supported(template: Any, epilogues: Any) -> tuple[bool, bool]:
        if isinstance(getattr(template.node, "template", None), _Template):
            return False, False
        return original(template, epilogues)

    module.template_fusion_with_epilogues_supported = supported


class _Template(CppTemplate):
    """The code of one convolution."""

    def __init__(
        self, nodes: list[Any], layout: ir.Layout, padding: tuple[int, int], rectified: bool
    ) -> None:
        super().__init__("winograd", nodes, layout, parallel_num_threads())
        self._padding, self._rectified = padding, rectified

    def render(self, **options: Any) -> str:
        kernel: CppTemplateKernel = options["kernel"]
        result: Any = options.get("template_buffer_node") or self.output_node
        x, weight, *bias = self.input_nodes
        _, height, width, channels = map(int, x.get_size())
        images, rows, columns, outputs = map(int, result.get_size())
        sizes = _Sizes(images, rows, columns, channels, outputs)
        products = (sizes.tiles, _WIDTH, sizes.part, channels, _WIDTH, _WIDTH)
        most = math.ceil(sizes.tiles / math.ceil(sizes.tiles / _MOST_ROWS))
        gemm = FewRowsGemm(
            f"{kernel.kernel_name}_gemm",
            sizes.tiles,
            sizes.part,
            GemmBlocking(most, _WIDTH, 1),
            inlined=True,
        )
        text: Any = CppTemplate._template_from_string(_CODE)
        return str(
            text.render(
                **vars(sizes),
                template=self,
                kernel=kernel,
                gemm=gemm,
                products=", ".join(map(str, products)),
                inputs={"X": x, "W": weight, **({"B": bias[0]} if bias else {})},
                aliases=None,
                X=x,
                Y=result,
                biased=bool(bias),
                rectified=self._rectified,
                padding=self._padding,
                height=height,
                width_in=width,
                channels=channels,
                rows=rows,
                columns=columns,
                outputs=outputs,
                width=_WIDTH,
                threads=self.num_threads,
            )
        )
