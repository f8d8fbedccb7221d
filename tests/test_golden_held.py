"""The golden file of version 1 with held tensors: weights, a tied name and state."""

import copy
import io
from pathlib import Path

import pytest
import torch
from test_golden_files import FIELDS

import neuron_ext

FILE = Path(__file__).parent / "golden" / "state_v1_held.pt"
HELD_FIELDS = {
    1: {"held_inputs"},
    2: set(),
    3: {"state_initial_sizes", "state_inputs", "state_outputs", "tied_inputs"},
    4: {"tied_names"},
    5: {"state_initial"},
}
SCALE = [1.0, 2.0, 4.0]


@pytest.fixture
def golden():
    model = torch.jit.load(FILE)
    yield model
    neuron_ext.unload(model)


def resaved(model):
    buffer = io.BytesIO()
    torch.jit.save(model, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def check(model):
    (status,) = neuron_ext.status(model)
    assert (status.name, status.state, status.cores) == ("GoldenHeld", "loaded", [2])
    x = torch.tensor([1.0, 2.0, 3.0])
    assert model(x).tolist() == [2.5, 6.25, 16.125]
    assert (model.total.tolist(), model.count.tolist()) == ([1.5, 4.25, 12.125], [8, 8])
    assert model(x).tolist() == [3.5, 10.25, 28.125]
    neuron_ext.reset_state(model)
    assert (model.total.tolist(), model.count.tolist()) == ([0.5, 0.25, 0.125], [7, 7])
    assert model.inner.same_scale.data_ptr() == model.scale.data_ptr()
    neuron_ext.replace_weights(model, {"scale": torch.zeros(3)})
    assert model(x).tolist() == [0.5, 0.25, 0.125]
    neuron_ext.replace_weights(model, {"inner.same_scale": torch.tensor(SCALE)})
    assert model.scale.tolist() == SCALE
    neuron_ext.reset_state(model)


@pytest.mark.parametrize("way", [lambda m: m, lambda m: resaved(resaved(m)), copy.deepcopy])
def test_held_tensors_of_version_1_compute_what_they_did(golden, way):
    model = way(golden)
    neuron_ext.set_neuron_cores(model, 2, 1)  # a copy loads at its first use
    check(model)


def test_the_fields_of_held_tensors_written_today_are_those_of_version_1(golden):
    state = golden.subgraph.__getstate__()[0]
    assert state[0] == 1
    assert {bag: set(state[bag]) for bag in FIELDS} == {
        bag: FIELDS[bag] | HELD_FIELDS[bag] for bag in FIELDS
    }
