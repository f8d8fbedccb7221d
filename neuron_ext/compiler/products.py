"""Products of few rows with packed weights, for TorchInductor to put into the code of a subgraph.

A product of few rows waits for its weights to arrive from memory, or from the caches, about as long
as it computes. The kernels that oneDNN has for that do not ask for weights ahead of time; these do,
and take less time for it (`python -m benchmarks run --only kernels`). They go into TorchInductor's
own template for products, which packs weights when it compiles and fuses what follows.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch._inductor import config, ir, lowering
from torch._inductor.codegen import cpp_gemm_template
from torch._inductor.codegen.cpp_micro_gemm import CppMicroGemm
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import GemmBlocking
from torch._inductor.cpu_vec_isa import VecAVX512, pick_vec_isa

# With more, oneDNN computes as fast. And how many values rows have at most, up to as many rows.
_MOST_ROWS = 256
_MOST_VALUES = {128: 1 << 19, _MOST_ROWS: 1 << 18}
# One row reads weights from memory, beyond the caches, faster with oneDNN.
_MOST_WEIGHTS_OF_ONE_ROW = 1 << 20
# With fewer, reading weights takes longer than computing.
_BUSY_ROWS = 33
# Values that the second-level cache holds of the rows while they are multiplied with all weights.
# Where they have more, as many inputs at a time as are in _PART.
_HELD_VALUES = 1 << 17
_PART = 768
# Values of weights that all rows are multiplied with before the next: they and those asked for
# meanwhile are about what the first-level cache holds.
_CHUNK = 9216
_CHUNK_OF_FEW_ROWS = 4096
# What oneDNN computes of each result on the way, and TorchInductor more slowly, is left to it.
_CHEAP = ("none", "relu", "gelu")

_active: ContextVar[bool] = ContextVar("few_rows_products", default=False)


class FewRowsGemm(CppMicroGemm):
    """Adds up float32 products of a block of rows in registers, with weights asked for ahead."""

    _KERNEL = r"""
template <int64_t ROWS, bool accum, int64_t LINES, int64_t EVERY>
{{inlined}} void {{kernel_name}}_rows(
    const float* {{restrict_keyword}} A,
    const float* {{restrict_keyword}} B,
    float* {{restrict_keyword}} C,
    const float* ahead,
    int64_t K,
    int64_t lda,
    int64_t ldb,
    int64_t ldc
) {
    using Vec = at::vec::Vectorized<float>;
    constexpr int64_t COLS = {{block_n}} / Vec::size();
    Vec sums[ROWS][COLS];
    #pragma GCC unroll {{block_m}}
    for (int64_t m = 0; m < ROWS; ++m) {
        #pragma GCC unroll {{block_n // 8}}
        for (int64_t n = 0; n < COLS; ++n) {
            sums[m][n] = accum ? Vec::loadu(C + m * ldc + n * Vec::size()) : Vec(0.0f);
        }
    }
    // A function of its own: written into the loop, GCC 12 keeps sums in memory.
    const auto add = [&](const float* values) __attribute__((always_inline)) {
        Vec weights[COLS];
        #pragma GCC unroll {{block_n // 8}}
        for (int64_t n = 0; n < COLS; ++n) {
            weights[n] = Vec::loadu(B + n * Vec::size());
        }
        #pragma GCC unroll {{block_m}}
        for (int64_t m = 0; m < ROWS; ++m) {
            const Vec value(values[m * lda]);
            #pragma GCC unroll {{block_n // 8}}
            for (int64_t n = 0; n < COLS; ++n) {
                sums[m][n] = at::vec::fmadd(value, weights[n], sums[m][n]);
            }
        }
        B += ldb;
    };
    for (int64_t k = 0; k < K; ++k) {
        if (LINES > 0 && k % EVERY == 0) {
            #pragma GCC unroll {{block_n // 8}}
            for (int64_t n = 0; n < LINES; ++n) {
                __builtin_prefetch(ahead + n * 16);
            }
            ahead += LINES * 16;
        }
        add(A + k);
    }
    #pragma GCC unroll {{block_m}}
    for (int64_t m = 0; m < ROWS; ++m) {
        #pragma GCC unroll {{block_n // 8}}
        for (int64_t n = 0; n < COLS; ++n) {
            sums[m][n].store(C + m * ldc + n * Vec::size());
        }
    }
}
template <bool accum>
{{inlined}} void {{kernel_name}}_chunk(
    const float* {{restrict_keyword}} A,
    const float* {{restrict_keyword}} B,
    float* {{restrict_keyword}} C,
    int64_t M,
    int64_t K,
    int64_t lda,
    int64_t ldb,
    int64_t ldc
) {
    // The blocks of rows share in asking for the next chunk, so that memory never waits for them.
    const float* ahead = B + {{depth}} * ldb;
    int64_t m = 0;
    for (; m + {{block_m}} <= M; m += {{block_m}}) {
        if (m < {{asking * block_m}}) {
            {{kernel_name}}_rows<{{block_m}}, accum, {{lines}}, {{every}}>(
                A + m * lda, B, C + m * ldc, ahead, K, lda, ldb, ldc);
            ahead += K / {{every}} * {{lines * 16}};
        } else {
            {{kernel_name}}_rows<{{block_m}}, accum, 0, 1>(
                A + m * lda, B, C + m * ldc, ahead, K, lda, ldb, ldc);
        }
    }
{%- if rest %}
    if (m < M) {
        {{kernel_name}}_rows<{{rest}}, accum, 0, 1>(
            A + m * lda, B, C + m * ldc, ahead, K, lda, ldb, ldc);
    }
{%- endif %}
}
{{declare_kernel}} {
    for (int64_t n = 0; n < N; n += {{block_n}}) {
        for (int64_t k = 0; k < K; k += {{depth}}) {
            const int64_t depth = std::min<int64_t>({{depth}}, K - k);
            const float* weights = B + k * ldb + n;
            if (accum || k > 0) {
                {{kernel_name}}_chunk<true>(
                    A + k, weights, C + n, M, depth, lda, ldb, ldc);
            } else {
                {{kernel_name}}_chunk<false>(
                    A + k, weights, C + n, M, depth, lda, ldb, ldc);
            }
        }
    }
}
"""

    def __init__(
        self, name: str, rows: int, inputs: int, blocking: GemmBlocking, *, inlined: bool = False
    ) -> None:
        """``inlined`` to have it in the code of its caller, whose sizes are constants."""
        f32 = torch.float32
        super().__init__(name, f32, f32, f32, f32, blocking)
        self.inlined = inlined
        self.rows, self.inputs = rows, inputs

    def codegen_define(self, kernel: CppTemplateKernel) -> str:
        most, width, _ = self.register_blocking
        lines = width // 16
        blocks = self.rows // most
        # With few blocks each asks for several lines at a time, with many for one now and then.
        each = math.ceil(lines / blocks)
        every = 1 << min(4, max(0, (blocks // lines).bit_length() - 1))
        untyped: Any = self
        options = {
            **untyped.get_common_options(),
            "declare_kernel": untyped.get_kernel_declaration(),
            "block_m": most,
            "block_n": width,
            "inlined": "__attribute__((always_inline)) inline" if self.inlined else "inline",
            "rest": self.rows % most,
            "depth": _depth(self.rows, self.inputs, width),
            "lines": each,
            "every": every,
            "asking": math.ceil(lines * every / each),
        }
        return str(CppTemplate._template_from_string(self._KERNEL).render(options))


class _Blocking(GemmBlocking):
    """Rows, outputs and inputs that are summed up at a time, in these products and in no others."""


def _blocking(rows: int, outputs: int) -> _Blocking:
    """For the registers, of which there are 32 with 16 values each.

    With rows that wait for weights blocks are smaller: each asks for as many weights as the others.
    """
    wide = (48, 64) if rows >= _BUSY_ROWS else (64,)
    width = next(width for width in (*wide, 32, 16) if outputs % width == 0)
    most = {64: 4 if 6 < rows < _BUSY_ROWS else 6, 48: 8, 32: 8, 16: 12}[width]
    return _Blocking(math.ceil(rows / math.ceil(rows / most)), width, 1)


def _depth(rows: int, inputs: int, width: int) -> int:
    """Inputs that a chunk of weights is for: chunks of a product are of about one size."""
    most = (_CHUNK if rows >= _BUSY_ROWS else _CHUNK_OF_FEW_ROWS) // width
    if rows * inputs > _HELD_VALUES:
        inputs = min(inputs, _PART)
    return math.ceil(inputs / math.ceil(inputs / most) / 16) * 16


def suits(rows: Any, inputs: Any, outputs: Any) -> bool:
    """Whether a product has the shape for which this was measured to be no slower."""
    if not all(
        isinstance(size, int) or getattr(size, "is_Integer", False)
        for size in (rows, inputs, outputs)
    ):
        return False
    return bool(
        1 <= rows <= _MOST_ROWS
        and rows * inputs <= next(most for limit, most in _MOST_VALUES.items() if rows <= limit)
        and (rows > 1 or inputs * outputs <= _MOST_WEIGHTS_OF_ONE_ROW)
        and outputs % 16 == 0
        and isinstance(pick_vec_isa(), VecAVX512)
    )


def wanted() -> bool:
    """Whether this thread is to compile with these products."""
    return _active.get()


@contextlib.contextmanager
def few_rows_products() -> Iterator[None]:
    """What this thread compiles meanwhile has these products where they suit."""
    _install()
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


@functools.cache
def _install() -> None:
    """Wrap what TorchInductor has, for good: of two compiles at a time, neither could put back what
    it found. What others compile passes through, and to wrap twice does no harm.
    """
    templates: Any = cpp_gemm_template
    templates.create_micro_gemm = _create_micro_gemm(templates.create_micro_gemm)
    template = templates.CppGemmTemplate
    template._cache_blocking = _cache_blocking(template._cache_blocking)
    onednn = torch.ops.mkldnn._linear_pointwise
    lowerings = lowering.lowerings
    unary = _linear(lowerings[onednn.default])
    lowerings[onednn.default] = unary
    lowerings[onednn.binary] = _linear_and_add(lowerings[onednn.binary], unary)


def _create_micro_gemm(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_micro_gemm(name: str, m: Any, n: Any, k: Any, **options: Any) -> Any:
        dtypes = {options["input_dtype"], options["input2_dtype"]}
        plain = dtypes == {torch.float32} and options.get("alpha", 1) == 1
        if _active.get() and plain and suits(m, k, n):
            return FewRowsGemm(name, int(m), int(k), _blocking(int(m), int(n)))
        return original(name, m, n, k, **options)

    return create_micro_gemm


def _cache_blocking(original: Callable[..., Any]) -> Callable[..., Any]:
    """All rows of a thread at a time, which the template would cut up to go through all weights for
    each of them again.
    """

    @functools.wraps(original)
    def cache_blocking(template: Any, num_threads: int) -> Any:
        blocking = template.register_blocking
        if not isinstance(blocking, _Blocking):
            return original(template, num_threads)
        of_thread = template.thread_blocking(num_threads)
        rows = of_thread.block_m * blocking.block_m
        if rows * of_thread.block_k <= _HELD_VALUES:
            return GemmBlocking(of_thread.block_m, 1, of_thread.block_k)
        # The sums are added to once for each part, and are held, too.
        columns = max(1, _HELD_VALUES // (rows * blocking.block_n))
        return GemmBlocking(of_thread.block_m, min(columns, of_thread.block_n), _PART)

    return cache_blocking


def _linear(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def linear(x: Any, w: Any, b: Any, attr: str, *args: Any, **kwargs: Any) -> Any:
        wanted = _active.get() and attr in _CHEAP and _suit(x, w)
        if not wanted or config.max_autotune:  # which takes what it finds to be faster
            return original(x, w, b, attr, *args, **kwargs)
        # The template takes no rows whose values are apart.
        x = ir.ExternKernel.require_stride_order(x, [*reversed(range(len(x.get_size())))])
        with config.patch(max_autotune_gemm=True, max_autotune_gemm_backends="CPP"):
            return original(x, w, b, attr, *args, **kwargs)

    return linear


def _linear_and_add(original: Callable[..., Any], unary: Callable[..., Any]) -> Callable[..., Any]:
    """Adds outside of the product, where TorchInductor's scheduler fuses them again: in a template,
    the lowering of both at once fails on some of what there is to add.
    """

    @functools.wraps(original)
    def linear(x: Any, y: Any, w: Any, b: Any, attr: str, *args: Any, **kwargs: Any) -> Any:
        if not _active.get():
            return original(x, y, w, b, attr, *args, **kwargs)
        if attr == "add" and (config.max_autotune or _suit(x, w)):
            return lowering.add(unary(x, w, b, "none", [], ""), y)
        with config.patch(max_autotune=False):
            return original(x, y, w, b, attr, *args, **kwargs)

    return linear


def _suit(x: Any, w: Any) -> bool:
    *rows, inputs = x.get_size()
    return x.get_dtype() == torch.float32 and suits(math.prod(rows), inputs, w.get_size()[0])
