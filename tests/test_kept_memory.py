"""What inferences free is at hand for the next: no page faults, unless the user says otherwise."""

import pytest
import torch
from helpers_processes import run_python

import neuron_ext

CODE = """
    import resource, sys, torch, neuron_ext

    module, x = torch.jit.load(sys.argv[1]), torch.randn(1, 4, 256, 256)
    for _ in range(8):
        module(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        module(x)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""
# One of the buffers of an inference.
PAGES = 16 * 256 * 256 * 4 // 4096


class Wide(torch.nn.Module):
    """Several buffers of 4 MB."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(inputs, 16, 3, padding=1) for inputs in (4, 16, 16)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide") / "model.pt"
    traced = neuron_ext.trace(Wide().eval(), torch.randn(1, 4, 256, 256), compiler_args="-O1")
    torch.jit.save(traced, path)
    return path


def faults(saved, env):
    """Page faults per inference."""
    return float(run_python(CODE, saved, env=env))


def test_inferences_find_the_memory_of_those_before(saved):
    assert faults(saved, {}) < PAGES / 100


@pytest.mark.parametrize(
    "env",
    [
        {"MALLOC_TRIM_THRESHOLD_": 131072},
        {"MALLOC_MMAP_THRESHOLD_": 131072},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
    ids=lambda env: "".join(env) + str(*env.values())[-24:-7],
)
def test_what_the_user_says_of_malloc_stays(saved, env):
    assert faults(saved, env) > PAGES / 2
