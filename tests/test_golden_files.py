"""Files of every released state version load, and compute what they always computed."""

import copy
import io
from pathlib import Path

import pytest
import torch

import neuron_ext

GOLDEN = Path(__file__).parent / "golden"
FIELDS = {
    1: {"async_load", "checksum_graph", "dynamic_batch", "lazy_load", "nc_count", "start_nc"},
    2: {
        "arch",
        "format",
        "name",
        "producer",
        "runtime",
        "sha256_graph",
        "sha256_state",
        "torch_version",
    },
    3: {
        "constant_offsets",
        "constant_opaque_sizes",
        "constant_ranks",
        "constant_shapes",
        "constant_sizes",
        "constant_strides",
        "input_ranks",
        "input_shapes",
        "mutated_inputs",
        "output_ranks",
        "output_shapes",
    },
    4: {
        "constant_dtypes",
        "constant_fqns",
        "constant_layouts",
        "constant_names",
        "cpu_features",
        "input_dtypes",
        "input_names",
        "output_dtypes",
        "output_names",
    },
    5: {"graph"},
}


@pytest.fixture
def golden():
    model = torch.jit.load(GOLDEN / "state_v1.pt")
    yield model
    neuron_ext.unload(model)


def resaved(model: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(model, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def check(model: torch.jit.ScriptModule) -> None:
    (status,) = neuron_ext.status(model)
    assert (status.name, status.state) == ("Golden", "unloaded")
    assert (status.lazy_load, status.async_load, status.dynamic_batch) == (True, False, False)
    assert (status.start_nc, status.nc_count) == (1, -1)
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    out = model({"values": values, "mask": torch.tensor([1, 0])}, torch.tensor([0.5, 0.25, 0.125]))
    assert out["all"][0].tolist() == [[1.5, 4.25, 12.125], [4.5, 10.25, 24.125]]
    assert out["all"][1].item() == 56.75
    assert out["mask"][0].tolist() == [1.0, 0.0]
    assert neuron_ext.status(model)[0].cores == [1]


def test_version_1_loads_and_computes(golden):
    check(golden)


def test_version_1_saved_again_is_the_same(golden):
    check(resaved(resaved(golden)))


def test_version_1_survives_deepcopy(golden):
    check(copy.deepcopy(golden))


def test_the_fields_written_today_are_those_of_version_1(golden):
    state = golden.subgraph.__getstate__()[0]
    assert state[0] == 1
    assert {bag: set(state[bag]) for bag in FIELDS} == FIELDS
