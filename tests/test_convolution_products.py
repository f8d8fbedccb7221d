"""Convolutions that are compiled as products: right in every form, and only where they gain.

Those of many pixels by tiles have tests of their own.
"""

import copy
import threading

import pytest
import torch
from torch._inductor.cpu_vec_isa import VecAVX512, pick_vec_isa

import neuron_ext

# Code without AVX-512 has no products of this kind.
FAST = isinstance(pick_vec_isa(), VecAVX512)


class Convolutions(torch.nn.Module):
    """One convolution for each of the settings, all of the same input, and what comes after it."""

    def __init__(self, settings, after):
        super().__init__()
        self.after = after
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(**one) for one in settings)

    def forward(self, x):
        return tuple(self.after(layer(x)) for layer in self.layers)


def check(tmp_path, model, inputs, *, products, convolutions, linears=0):
    """Trace, compare with float64, and count what is in the code."""
    model = model.eval()
    traced = neuron_ext.trace(model, inputs, compiler_args="-O1", compiler_workdir=tmp_path)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        eager = model(*inputs)
    found = traced(*inputs)
    for one, exact, plain in zip(found, wanted, eager, strict=True):
        torch.testing.assert_close(one.double(), exact, atol=1e-5, rtol=1e-5)
        assert one.shape == plain.shape
    if not FAST:
        products, convolutions = 0, convolutions + products
    wrapper = (tmp_path / "wrapper.cpp").read_text()
    kernel = (tmp_path / "kernel.cpp").read_text()
    assert wrapper.count("_convolution_pointwise") == convolutions
    assert wrapper.count("_linear_pointwise(") == linears
    assert ("micro_gemm_rows" in kernel) == (products > 0)
    return traced


def conv(inputs, outputs, window, **more):
    return {"in_channels": inputs, "out_channels": outputs, "kernel_size": window, **more}


def test_every_form_of_window_gives_the_right_sums(tmp_path):
    torch.manual_seed(0)
    settings = [
        conv(24, 32, 1),
        conv(24, 48, 1, bias=False),
        conv(24, 32, 1, stride=2),
        conv(24, 64, 1, stride=(3, 2)),
        conv(24, 32, 1, padding=1, stride=2),
        conv(24, 32, 3, padding=1, stride=2),
        conv(24, 32, 3),
        conv(24, 32, 3, padding=2, dilation=2),
        conv(24, 32, (1, 3), padding=(0, 1)),
        conv(24, 32, (5, 2), padding=(2, 1), stride=(2, 1), dilation=(1, 3), bias=False),
        conv(24, 32, (3, 7)),
        conv(24, 32, 3, padding="valid"),
    ]
    model = Convolutions(settings, torch.relu)
    check(tmp_path, model, (torch.randn(1, 24, 8, 7),), products=len(settings), convolutions=0)


def test_images_of_a_batch_are_not_mixed_up(tmp_path):
    torch.manual_seed(1)
    settings = [conv(16, 32, 1), conv(16, 32, 3, padding=1), conv(16, 32, 3, stride=2)]
    model = Convolutions(settings, lambda x: x * 2)
    check(tmp_path, model, (torch.randn(4, 16, 4, 4),), products=3, convolutions=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inputs_in_either_layout(tmp_path, layout):
    torch.manual_seed(2)
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=layout)
    model = Convolutions([conv(16, 32, 1), conv(16, 32, 3)], torch.relu)
    check(tmp_path, model, (x,), products=2, convolutions=0)


class Block(torch.nn.Module):
    """What is around convolutions: normalisation, something added, pooling, a head."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.narrow = torch.nn.Conv2d(32, 16, 1, bias=False)
        self.norm = torch.nn.BatchNorm2d(16)
        self.middle = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.wide = torch.nn.Conv2d(16, 32, 1)
        self.beside = torch.nn.Conv2d(32, 32, 1)
        self.head = torch.nn.Linear(32, 10)
        torch.nn.init.uniform_(self.norm.running_mean)
        torch.nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        y = torch.relu(self.norm(self.narrow(x)))
        y = self.wide(torch.sigmoid(self.middle(y)))
        y = torch.relu(y + self.beside(x)) + x
        return self.head(y.mean((2, 3))), y, y.flatten(1)


def test_a_block_of_a_network(tmp_path):
    torch.manual_seed(3)
    # 64 pixels, and 256: windows stay convolutions where there are many, or three channels.
    for size, products, convolutions in ((16, 4, 1), (32, 3, 2)):
        check(
            tmp_path / str(size),
            Block(),
            (torch.randn(1, 3, size, size),),
            products=products,
            convolutions=convolutions,
            linears=1,
        )


def test_what_gains_nothing_stays_a_convolution(tmp_path):
    torch.manual_seed(4)
    settings = [
        conv(32, 32, 1),  # too many pixels: 17 x 16
        conv(32, 32, 3, groups=2, stride=4),
        conv(32, 20, 3, stride=4),  # outputs that do not fill registers
        conv(32, 32, 8, stride=8),  # patches, each of whose pixels would be a copy
        conv(32, 32, 3),  # too many windows
    ]
    model = Convolutions(settings, torch.relu)
    check(tmp_path / "many", model, (torch.randn(1, 32, 17, 16),), products=0, convolutions=5)
    model = Convolutions([conv(8, 32, 3)], torch.relu)
    check(tmp_path / "thin", model, (torch.randn(1, 8, 6, 6),), products=0, convolutions=1)


class Shared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return torch.relu(self.layer(torch.relu(self.layer(x)))), x


def test_weights_used_twice_are_right(tmp_path):
    torch.manual_seed(5)
    model = Shared().eval()
    x = torch.randn(1, 16, 4, 4)
    traced = neuron_ext.trace(model, x, compiler_args="-O1", compiler_workdir=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), atol=1e-5, rtol=1e-5)


def test_outputs_are_laid_out_as_eager_has_them(tmp_path):
    torch.manual_seed(6)
    model = Convolutions([conv(16, 32, 1), conv(16, 32, 3)], lambda x: x).eval()
    x = torch.randn(1, 16, 5, 5)
    traced = neuron_ext.trace(model, x, compiler_args="-O1", compiler_workdir=tmp_path)
    with torch.no_grad():
        for found, wanted in zip(traced(x), model(x), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
            assert found.stride() == wanted.stride()


def test_weights_are_stored_once(tmp_path):
    model = Convolutions([conv(256, 512, 1), conv(256, 128, 3)], torch.relu)
    check(tmp_path, model, (torch.randn(1, 256, 4, 4),), products=2, convolutions=0)
    weights = 4 * (256 * 512 + 512 + 9 * 256 * 128 + 128)
    assert weights <= (tmp_path / "weights.blob").stat().st_size < weights + 4096


def test_what_others_compile_meanwhile_is_left_alone():
    from neuron_ext.compiler.convolutions import convolutions_as_products
    from neuron_ext.compiler.products import few_rows_products

    model, x = torch.nn.Conv2d(16, 32, 1).eval(), torch.randn(1, 16, 4, 4)
    codes = []

    def compile_it():
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(freezing=True, fx_graph_cache=False):
            work = torch.compile(lambda x: torch.relu(model(x)))
            codes.append(torch._inductor.utils.run_and_get_code(work, x)[1][0])

    # The configuration of TorchInductor is of all threads, what is wanted is of this one.
    with few_rows_products(), convolutions_as_products(tiled=True):
        thread = threading.Thread(target=compile_it)
        thread.start()
        thread.join(300)
    assert len(codes) == 1
    assert "micro_gemm_rows" not in codes[0]
    assert "_convolution_pointwise" in codes[0]


def test_passes_of_the_caller_run_too(tmp_path):
    seen = []
    before = torch._inductor.config.post_grad_custom_pre_pass
    torch._inductor.config.post_grad_custom_pre_pass = seen.append
    try:
        model = Convolutions([conv(16, 32, 1)], torch.relu)
        check(tmp_path, model, (torch.randn(1, 16, 4, 4),), products=1, convolutions=0)
    finally:
        torch._inductor.config.post_grad_custom_pre_pass = before
    assert len(seen) == 1
