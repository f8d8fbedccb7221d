"""Products of few rows in compiled code: right for every shape, and used where they are faster."""

import os

import pytest
import torch
from helpers_processes import run_python
from torch._inductor.cpu_vec_isa import VecAVX512, pick_vec_isa

import neuron_ext


class Products(torch.nn.Module):
    """One product for each shape of (rows, inputs, outputs), and what comes after it."""

    def __init__(self, shapes, after, bias=True):
        super().__init__()
        self.after = after
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(inputs, outputs, bias=bias) for _, inputs, outputs in shapes
        )

    def forward(self, *x):
        return tuple(self.after(layer(x)) for layer, x in zip(self.layers, x, strict=True))


def check(tmp_path, shapes, after, *, fast, bias=True, error=1e-5):
    """Trace, compare with float64, and count the products of either kind in the code."""
    torch.manual_seed(len(shapes))
    model = Products(shapes, after, bias).eval()
    inputs = tuple(torch.randn(rows, inputs) for rows, inputs, _ in shapes)
    traced = neuron_ext.trace(model, inputs, compiler_args="-O1", compiler_workdir=tmp_path)
    with torch.no_grad():
        wanted = model.double()(*(x.double() for x in inputs))
        for shape, found, exact in zip(shapes, traced(*inputs), wanted, strict=True):
            torch.testing.assert_close(
                found.double(),
                exact,
                atol=error,
                rtol=error,
                msg=lambda text, s=shape: f"{s}: {text}",
            )
    has_kernels = isinstance(pick_vec_isa(), VecAVX512)
    count = (tmp_path / "wrapper.cpp").read_text().count("_linear_pointwise(")
    assert count == (0 if fast and has_kernels else len(shapes))
    assert ("micro_gemm_rows" in (tmp_path / "kernel.cpp").read_text()) == (fast and has_kernels)


# Every way to cut rows into blocks, with a rest and without, and every width of a block; numbers of
# inputs that are, and are not, whole cache lines; more inputs than the first-level cache holds, and
# than the second-level cache holds of all rows.
_ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 31, 32, 33, 47, 128, 129, 256)
_SHAPES = [
    *((rows, 64, 64) for rows in _ROWS),
    *((rows, 37, 96) for rows in _ROWS[::2]),
    *((rows, 20, 16) for rows in _ROWS[1::2]),
    *((rows, 29, 32) for rows in _ROWS[::2]),
    (16, 1024, 48),
    (3, 1500, 128),
    (60, 2000, 32),
    (128, 700, 192),
]
_MANY_VALUES = [(128, 1537, 192), (128, 4096, 1088), (256, 1000, 640), (16, 9000, 64)]


def test_every_shape_of_few_rows_gives_the_right_sums(tmp_path):
    check(tmp_path, _SHAPES, torch.relu, fast=True)


def test_rows_with_many_values_are_multiplied_in_parts(tmp_path):
    check(tmp_path, _MANY_VALUES, torch.nn.functional.gelu, fast=True, error=1e-4)


def test_the_threads_of_a_core_share_the_products(tmp_path):
    run_python(
        """
        import sys, pathlib, torch
        from test_few_rows_products import check

        shapes = [(3, 1500, 128), (16, 64, 64), (33, 37, 96), (128, 20, 16), (128, 1537, 192)]
        check(pathlib.Path(sys.argv[1]), shapes, torch.relu, fast=True)
        """,
        tmp_path,
        env={"NEURON_EXT_HOST_CORES": 1, "NEURON_EXT_CACHE": 0},
        timeout=300,
    )
    several = len(os.sched_getaffinity(0)) > 1
    shared = "#pragma omp parallel" in (tmp_path / "kernel.cpp").read_text()
    assert shared == (several and isinstance(pick_vec_isa(), VecAVX512))


class Added(torch.nn.Module):
    """Something added to a product: a constant, an input, a product, the product's own input."""

    def __init__(self, bias):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=bias) for _ in range(6))

    def forward(self, x, y):
        first, *others = self.layers
        x = first(x) + torch.ones_like(x)
        for layer, add in zip(others, (y, x, first(y), y[:1], y[:, :1]), strict=True):
            x = layer(x) + add
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(("bias", "flags"), [(False, "-O1"), (True, "-O1"), (False, "-O3")])
def test_what_is_added_to_a_product(tmp_path, bias, flags):
    torch.manual_seed(1)
    model, inputs = Added(bias).eval(), (torch.randn(16, 64), torch.randn(16, 64))
    traced = neuron_ext.trace(model, inputs, compiler_args=flags, compiler_workdir=tmp_path)
    with torch.no_grad():
        wanted = model.double()(*(x.double() for x in inputs))
    torch.testing.assert_close(traced(*inputs).double(), wanted, atol=1e-5, rtol=1e-5)
    if flags == "-O1" and isinstance(pick_vec_isa(), VecAVX512):
        assert "_linear_pointwise(" not in (tmp_path / "wrapper.cpp").read_text()


def test_products_without_bias(tmp_path):
    check(tmp_path, [(16, 64, 64), (40, 64, 32)], torch.relu, fast=True, bias=False)


def test_what_is_slower_stays_with_onednn(tmp_path):
    shapes = [
        (257, 64, 64),  # too many rows
        (128, 4097, 64),  # too many inputs for the caches
        (129, 4096, 64),
        (1, 1025, 1024),  # one row, with weights from memory
        (16, 64, 20),  # outputs that do not fill registers
    ]
    check(tmp_path, shapes, torch.relu, fast=False)


def test_what_onednn_computes_faster_stays_with_it(tmp_path):
    check(tmp_path, [(16, 64, 64)], torch.sigmoid, fast=False)


def test_weights_are_stored_once(tmp_path):
    check(tmp_path, [(16, 512, 512)], torch.relu, fast=True)
    weights = 4 * (512 * 512 + 512)
    assert weights <= (tmp_path / "weights.blob").stat().st_size < weights + 4096


def test_what_others_compile_is_left_alone(tmp_path):
    check(tmp_path, [(16, 64, 64)], torch.relu, fast=True)
    model, x = torch.nn.Linear(64, 64).eval(), torch.randn(16, 64)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True, fx_graph_cache=False):
        _, (code,) = torch._inductor.utils.run_and_get_code(torch.compile(model), x)
    assert "micro_gemm" not in code
