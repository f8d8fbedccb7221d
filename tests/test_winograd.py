"""Convolutions by tiles of 4x4 pixels: right at every edge, and only where they gain."""

import copy
import math
import os

import pytest
import torch
from helpers_processes import run_python
from torch._inductor.cpu_vec_isa import VecAVX512, pick_vec_isa

import neuron_ext

# Code without AVX-512 has none.
FAST = isinstance(pick_vec_isa(), VecAVX512)


class Convolutions(torch.nn.Module):
    """One convolution for each of the settings, with an input of its own, and what follows it."""

    def __init__(self, settings, after=torch.relu):
        super().__init__()
        self.after = after
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(**{"kernel_size": 3, "padding": 1, **one}) for one in settings
        )

    def forward(self, *inputs):
        return tuple(self.after(layer(x)) for layer, x in zip(self.layers, inputs, strict=True))


def conv(inputs, outputs, **more):
    return {"in_channels": inputs, "out_channels": outputs, **more}


def check(tmp_path, model, inputs, *, tiled, args=""):
    """Trace, compare with float64, and count the convolutions that are left in the code."""
    model, inputs = model.eval(), tuple(inputs)
    traced = neuron_ext.trace(model, inputs, compiler_args=args, compiler_workdir=tmp_path)
    found = traced(*inputs)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        eager = model(*inputs)
    for one, exact, plain in zip(found, wanted, eager, strict=True):
        torch.testing.assert_close(one.double(), exact, atol=1e-5, rtol=1e-5)
        assert one.shape == plain.shape
        if all(x.is_contiguous() for x in inputs):
            assert one.stride() == plain.stride()
    everything = sum(isinstance(layer, torch.nn.Conv2d) for layer in model.modules())
    left = (tmp_path / "wrapper.cpp").read_text().count("_convolution_pointwise")
    assert everything - left == (tiled if FAST else 0)
    return traced


def test_every_form_is_right_and_what_gains_nothing_is_left(tmp_path):
    torch.manual_seed(0)
    forms = [
        conv(64, 64),
        conv(32, 96, bias=False),
        conv(64, 32, padding=0),
        conv(64, 32, padding=2),
        conv(64, 32, padding=(0, 1)),
        conv(64, 32, padding="same"),
        conv(64, 32, padding="valid", bias=False),
    ]
    # Even and odd numbers of pixels, tiles that do and do not fill a strip.
    tiled = [(one, (1, *size)) for one in forms for size in ((14, 20), (13, 69))]
    # 3 x 36 tiles: strips that begin in one image and end in the next.
    tiled.append((conv(64, 32), (3, 11, 12)))
    # Transformed weights that the caches hold at once, and not; channels that are and are not
    # whole parts; tiles that have to be few.
    for inputs, outputs, size in ((128, 128, 9), (256, 256, 14), (272, 96, 9), (512, 64, 12)):
        tiled.append((conv(inputs, outputs), (1, size, size)))
    others = [
        conv(64, 64, stride=2),
        conv(64, 64, dilation=2),
        conv(64, 64, groups=2),
        conv(64, 64, kernel_size=5),
        conv(64, 80),  # outputs that do not fill blocks
        conv(64, 16),
        conv(16, 64),
        conv(528, 32),
    ]
    settings = tiled + [(one, (1, 18, 18)) for one in others]
    inputs = [torch.randn(n, one["in_channels"], *size) for one, (n, *size) in settings]
    check(tmp_path, Convolutions([one for one, _ in settings]), inputs, tiled=len(tiled))


def test_what_follows_is_computed_once(tmp_path):
    torch.manual_seed(1)
    model = Convolutions([conv(48, 64), conv(48, 32, bias=False)], lambda x: torch.sigmoid(x) + x)
    # In either layout.
    x = torch.randn(2, 48, 11, 12)
    y = torch.randn(2, 48, 11, 12).contiguous(memory_format=torch.channels_last)
    check(tmp_path, model, [x, y], tiled=2)


class Block(torch.nn.Module):
    """Convolutions one after another, with what a network has between them."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(64)
        self.second = torch.nn.Conv2d(64, 64, 3, padding=1)
        self.third = torch.nn.Conv2d(64, 32, 3, padding=1)
        torch.nn.init.uniform_(self.norm.running_mean)
        torch.nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        # Wanted as it is and rectified: the relu is not the convolution's alone.
        z = self.second(y)
        return self.third(torch.relu(z) + y) + x, z.mean((2, 3)), torch.relu(z)


def test_a_block_of_a_network(tmp_path):
    torch.manual_seed(5)
    check(tmp_path, Block(), (torch.randn(1, 32, 16, 18),), tiled=3)


def test_the_threads_of_a_core_share_the_tiles(tmp_path):
    run_python(
        """
        import sys, pathlib, torch
        from test_winograd import Convolutions, check, conv

        torch.manual_seed(6)
        # Weights transformed once by all, and by each thread for itself.
        model = Convolutions([conv(64, 64), conv(64, 96, bias=False), conv(256, 256)])
        sizes = (64, 15, 17), (64, 16, 16), (256, 14, 14)
        inputs = [torch.randn(2, *size) for size in sizes]
        check(pathlib.Path(sys.argv[1]), model, inputs, tiled=3)
        """,
        tmp_path,
        env={"NEURON_EXT_HOST_CORES": 1, "NEURON_EXT_CACHE": 0},
        timeout=300,
    )
    several = len(os.sched_getaffinity(0)) > 1
    shared = "#pragma omp for schedule(static)" in (tmp_path / "kernel.cpp").read_text()
    assert shared == (several and FAST)


def test_o1_multiplies_every_window(tmp_path):
    torch.manual_seed(8)
    model = Convolutions([conv(64, 64)])
    x = torch.randn(1, 64, 16, 16)
    x[0, :, 4, 4] = math.inf
    for args, tiled in (("-O1", 0), ("-O2", 1)):
        folder = tmp_path / args
        traced = neuron_ext.trace(model.eval(), x, compiler_args=args, compiler_workdir=folder)
        count = (folder / "wrapper.cpp").read_text().count("_convolution_pointwise")
        assert count == (1 - tiled if FAST else 1)
        found = traced(x)[0]
        with torch.no_grad():
            wanted = model(x)[0]
        # What an infinite pixel is not in the window of: finite by windows. By tiles, those of a
        # tile share it, and no others.
        reach = slice(2, 6) if tiled else slice(3, 6)
        outside = torch.ones(16, 16, dtype=torch.bool)
        outside[reach, reach] = False
        torch.testing.assert_close(
            found[0, :, outside], wanted[0, :, outside], atol=1e-5, rtol=1e-5
        )


def test_a_saved_file_gives_the_same_and_is_no_larger(tmp_path):
    torch.manual_seed(9)
    model = Convolutions([conv(128, 256)])
    traced = check(tmp_path, model, [torch.randn(1, 128, 12, 12)], tiled=1)
    weights = 4 * (9 * 128 * 256 + 256)
    assert weights <= (tmp_path / "weights.blob").stat().st_size < weights + 4096
    torch.jit.save(traced, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for _ in range(3):
        y = torch.randn(1, 128, 12, 12)
        assert torch.equal(loaded(y)[0], traced(y)[0])
    with pytest.raises(RuntimeError, match=r"float32 tensor of shape \[1, 128, 12, 12\]"):
        loaded(torch.randn(1, 128, 11, 12))
