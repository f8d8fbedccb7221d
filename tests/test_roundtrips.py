"""Save and load, copy, script, trace and freeze; and what loading leaves behind: nothing."""

import copy
import gc
import io
import os
import pathlib

import pytest
import torch
from helpers import (
    EXAMPLE,
    PythonProcess,
    executed_by,
    expected,
    flagged,
    only_status,
    run_python,
    save,
    trace_small_net,
)

import neuron_ext

pytestmark = pytest.mark.usefixtures("idle_cores")


@pytest.fixture
def fresh_net():
    """A fresh trace, unloaded at the end: torch never lets go of what it froze in this process."""
    module = trace_small_net()
    yield module
    neuron_ext.unload(module)


class Around(torch.nn.Module):
    """A module that uses another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


def through_path_name(module, folder):
    return torch.jit.load(str(save(module, folder / "m.pt")))


def through_path_object(module, folder):
    return torch.jit.load(pathlib.Path(save(module, folder / "m.pt")))


def through_open_file(module, folder):
    with open(save(module, folder / "m.pt"), "rb") as file:
        return torch.jit.load(file)


def through_buffer(module, _folder=None):
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def through_bytes_of_save(module, folder):
    module.save(str(folder / "m.pt"))
    return torch.jit.load(str(folder / "m.pt"), map_location="cpu")


def through_copy(module, _folder):
    return copy.deepcopy(module)


ROUTES = [
    through_path_name,
    through_path_object,
    through_open_file,
    through_buffer,
    through_bytes_of_save,
    through_copy,
]


def as_is(module):
    return module


def scripted(module):
    return torch.jit.script(Around(module).eval())


def traced(module):
    return torch.jit.trace(Around(module).eval(), EXAMPLE)


def nested_twice(module):
    return torch.jit.script(Around(Around(module)).eval())


def frozen(module):
    return torch.jit.freeze(module)


def frozen_wrapper(module):
    return torch.jit.freeze(scripted(module))


# Each with what it adds to the outputs.
SHAPES = [
    (as_is, 0),
    (scripted, 1),
    (traced, 1),
    (nested_twice, 2),
    (frozen, 0),
    (frozen_wrapper, 1),
]


def wishes(module):
    status = only_status(module)
    return status.start_nc, status.nc_count, status.lazy_load, status.async_load


class TestPlacementAndFlagsSurvive:
    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize(("shape", "added"), SHAPES)
    def test_every_route_and_wrapper(self, fresh_net, tmp_path, route, shape, added):
        neuron_ext.set_neuron_cores(fresh_net, 1, 2)
        neuron_ext.lazy_load(fresh_net)
        neuron_ext.async_load(fresh_net)
        neuron_ext.unload(fresh_net)
        again = route(shape(fresh_net), tmp_path)
        assert wishes(again) == (1, 2, True, True)
        assert only_status(again).state == "unloaded"
        assert torch.equal(again(EXAMPLE), expected() + added)
        assert only_status(again).cores == [1, 2]

    @pytest.mark.parametrize(("shape", "added"), SHAPES)
    def test_wrapping_shares_the_subgraph_and_moves_it_with_either(self, fresh_net, shape, added):
        wrapper = shape(fresh_net)
        neuron_ext.set_neuron_cores(wrapper, 2, 2)
        assert only_status(fresh_net) == only_status(wrapper)
        assert only_status(fresh_net).cores == [2, 3]
        calls = [executed_by(wrapper, lambda: wrapper(EXAMPLE)) for _ in range(2)]
        assert calls == [2, 3]
        assert torch.equal(wrapper(EXAMPLE), expected() + added)

    def test_save_after_load_and_after_a_move(self, small_net):
        again = through_buffer(small_net)
        assert wishes(again) == (-1, -1, False, False)
        neuron_ext.set_neuron_cores(again, start_nc=3)
        assert only_status(through_buffer(again)).cores == [3]
        neuron_ext.set_neuron_cores(again)
        assert wishes(through_buffer(again)) == (-1, -1, False, False)

    def test_many_times_over_the_file_stays_the_same_size(self, small_net):
        sizes = set()
        for _ in range(4):
            buffer = io.BytesIO()
            torch.jit.save(small_net, buffer)
            sizes.add(buffer.tell())
            small_net = torch.jit.load(io.BytesIO(buffer.getvalue()))
        assert len(sizes) == 1
        assert torch.equal(small_net(EXAMPLE), expected())

    @pytest.mark.parametrize("route", [through_path_name, through_buffer, through_copy])
    @pytest.mark.parametrize(("shape", "added"), [(as_is, 0), (scripted, 1), (frozen, 0)])
    def test_of_native_code(self, native_net, tmp_path, route, shape, added):
        neuron_ext.set_neuron_cores(native_net, 2, 2)
        again = route(shape(native_net), tmp_path)
        assert only_status(again).cores == [2, 3]
        assert torch.equal(again(EXAMPLE), expected() + added)

    def test_a_copy_lives_on_its_own(self, small_net):
        neuron_ext.set_neuron_cores(small_net, start_nc=1)
        twin = copy.deepcopy(small_net)
        neuron_ext.set_neuron_cores(twin, start_nc=2)
        neuron_ext.lazy_load(twin)
        assert only_status(small_net).cores == [1]
        assert wishes(small_net) == (1, -1, False, False)
        del small_net
        assert torch.equal(twin(EXAMPLE), expected())

    def test_replicas_do_not_make_the_file_bigger(self, small_net):
        sizes = set()
        for count in (1, 2, 4):
            neuron_ext.set_neuron_cores(small_net, 0, count)
            buffer = io.BytesIO()
            torch.jit.save(small_net, buffer)
            sizes.add(buffer.tell())
        assert len(sizes) == 1


class TestSubgraphsAreFoundEverywhere:
    @pytest.mark.parametrize(
        "hide",
        [
            lambda m: torch.nn.Sequential(torch.nn.Identity(), m),
            lambda m: torch.nn.ModuleList([m]),
            lambda m: torch.nn.ModuleDict({"a": torch.nn.ModuleList([Around(m)])}),
            lambda m: Around(Around(scripted(m))),
            lambda m: torch.jit.script(torch.nn.Sequential(torch.nn.Identity(), m)),
            lambda m: Around(frozen_wrapper(m)),
            lambda m: through_buffer(frozen_wrapper(m)),
        ],
        ids=["sequential", "list", "dict of list", "plain", "script", "frozen", "frozen and saved"],
    )
    def test_in_containers_of_any_kind(self, hide):
        module = trace_small_net()
        whole = hide(module)
        neuron_ext.set_neuron_cores(whole, 2, 2)
        (status,) = neuron_ext.status(whole)
        assert (status.name, status.cores) == ("SmallNet", [2, 3])
        neuron_ext.unload(whole)
        assert [status.state for status in neuron_ext.status(whole)] == ["unloaded"]

    @pytest.mark.parametrize(
        "hold",
        [
            lambda a, b: [a, b],
            lambda a, b: (a, b),
            lambda a, b: {"first": a, "second": b},
            lambda a, b: ([a], {"b": [b]}),
        ],
        ids=["list", "tuple", "dict", "nested"],
    )
    def test_in_attributes(self, hold):
        module = torch.nn.Identity()
        module.held = hold(trace_small_net().subgraph, trace_small_net(1).subgraph)
        holder = torch.jit.script(module)
        neuron_ext.set_neuron_cores(holder, start_nc=3)
        assert [status.cores for status in neuron_ext.status(holder)] == [[3], [3]]
        assert len(neuron_ext.status(through_buffer(holder))) == 2

    def test_several_in_one_module_each_by_its_own_weights(self):
        modules = [trace_small_net(shift) for shift in (0, 10, 20)]
        whole = through_buffer(torch.jit.script(torch.nn.ModuleList(modules)))
        assert [status.cores for status in neuron_ext.status(whole)] == [[0], [1], [2]]
        for i, shift in enumerate((0, 10, 20)):
            assert torch.equal(getattr(whole, str(i))(EXAMPLE), expected(shift=shift))

    def test_frozen_and_saved_modules_keep_their_wishes(self):
        module = flagged(trace_small_net(), lazy=True)
        again = through_buffer(torch.jit.freeze(through_buffer(module)))
        assert wishes(again) == (-1, -1, True, False)


def contents(folder):
    return sorted(os.listdir(folder))


def shared_contents():
    """Of the folders that others write to as well: what by its name could be ours."""
    names = [*contents("/tmp"), *contents("/dev/shm")]
    return [name for name in names if "neuron" in name or ".so" in name]


def open_files():
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the folder's own descriptor
            continue
    return sorted(links)


def mapped_files():
    with open("/proc/self/maps") as maps:
        return sorted({fields[5] for line in maps if len(fields := line.split(None, 5)) == 6})


class TestNothingIsLeftBehind:
    def test_no_file_after_loads_and_runs(self, native_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TMPDIR", str(tmp_path))

        before = shared_contents()
        for _ in range(3):
            module = torch.jit.load(str(native_file))
            neuron_ext.set_multicore(module)
            module(EXAMPLE)
            assert (contents(tmp_path), shared_contents()) == ([], before)
        del module
        assert (contents(tmp_path), shared_contents()) == ([], before)

    def test_no_file_after_a_kill(self, native_file, tmp_path):
        code = """
            import os, sys, torch, neuron_ext
            os.chdir(sys.argv[2])
            module = torch.jit.load(sys.argv[1])
            neuron_ext.set_multicore(module)
            module(torch.ones(2, 3))
            print("running", flush=True)
            sys.stdin.read()
        """
        env = {"NEURON_EXT_HOST_CORES": 2, "TMPDIR": tmp_path}
        before = shared_contents()
        with PythonProcess(code, native_file, tmp_path, env=env) as process:
            assert process.read_line() == "running"
            process.kill()
        assert (contents(tmp_path), shared_contents()) == ([], before)

    def test_open_files_and_mappings_stay_flat_over_fifty_loads(self, native_file):
        def cycle(i):
            module = torch.jit.load(str(native_file))
            neuron_ext.set_neuron_cores(module, i % 3, 2)
            assert torch.equal(module(EXAMPLE), expected())
            neuron_ext.unload(module)
            module(EXAMPLE)

        for i in range(3):
            cycle(i)
        gc.collect()
        files, maps = open_files(), mapped_files()
        with open("/proc/self/maps") as lines:
            count = len(lines.readlines())
        for i in range(50):
            cycle(i)
        assert open_files() == files
        assert mapped_files() == maps
        with open("/proc/self/maps") as lines:
            # The heap may split and join; each leaked library would bring four or more.
            assert len(lines.readlines()) < count + 50


SEED_FLOW = """
import io, sys, warnings
import torch
warnings.simplefilter("error")
import neuron_ext as torch_neuronx

def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own torch.jit.load and save
        return function(*args)

net = torch.nn.Linear(2, 2)
model = torch_neuronx.trace(net, torch.ones(1, 2), compiler=sys.argv[1])
torch_neuronx.lazy_load(model)
torch_neuronx.async_load(model)
buffer = io.BytesIO()
quietly(torch.jit.save, model, buffer)
with torch_neuronx.experimental.neuron_cores_context(0, 2):
    model = quietly(torch.jit.load, io.BytesIO(buffer.getvalue()))
with torch_neuronx.experimental.multicore_context():
    other = quietly(torch.jit.load, io.BytesIO(buffer.getvalue()))
model(torch.ones(1, 2))
torch_neuronx.experimental.set_neuron_cores(model, 1)
torch_neuronx.experimental.set_multicore(model)
torch_neuronx.wait(model)
torch_neuronx.status(model), torch_neuronx.core_stats(), torch_neuronx.visible_core_count()
model(torch.ones(1, 2))
torch_neuronx.unload(model)
"""


class TestNoWarnings:
    @pytest.mark.parametrize("compiler", ["torchscript", "inductor"])
    def test_of_ours_in_the_flow_of_the_seeds(self, compiler):
        run_python(SEED_FLOW, compiler, env={"NEURON_EXT_HOST_CORES": 4})
