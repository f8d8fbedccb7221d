"""The environment that all tests run in, and the models that they share.

Four cores, whatever the machine has, and no other setting from outside. Tests of other settings run
a process of their own: ``helpers.run_python``, or the ``fork_server`` fixture.
"""

import gc
import os
import tempfile

import helpers_processes
import pytest
import torch
from helpers import EXAMPLE, ForkServer, SmallNet

import neuron_ext

CORES = 4

# Read when something first needs a core, which is after all imports.
for _name in [name for name in os.environ if name.startswith(("NEURON_RT_", "NEURON_EXT_"))]:
    del os.environ[_name]
os.environ["NEURON_EXT_HOST_CORES"] = str(CORES)


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory):
    """For what is tested, and core locks: two runs of tests on one machine do not meet."""
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        patch.setattr(helpers_processes, "LOCK_FOLDER", folder)
        yield


def pytest_configure(config):
    # torch's own age, of which it warns at each call that tests make to it.
    for warning in ("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning"):
        config.addinivalue_line("filterwarnings", warning)


@pytest.fixture(scope="session", autouse=True)
def _compile_cache(tmp_path_factory):
    """One compile cache for all tests and the processes that they start, and not the user's.

    What TorchInductor finds out about the C++ compiler, in half a minute, is shared by all that the
    tests run in: it is safe among processes.
    """
    folder = tmp_path_factory.mktemp("cache")
    workers = "PYTEST_XDIST_WORKER" in os.environ
    shared = tmp_path_factory.getbasetemp().parent if workers else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "torchinductor"))
        patch.setenv("NEURON_EXT_CACHE_DIR", str(folder / "neuron_ext"))
        # The same folder for the processes, which get no NEURON_EXT_ variable.
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture(autouse=True)
def _same_environment_after_each_test():
    """What a test puts into the environment, or sets of torch's threads, ends with it."""
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _frozen_modules_are_unloaded(monkeypatch):
    """PyTorch keeps what a frozen module refers to for ever, if it was scripted in this process."""
    frozen, freeze = [], torch.jit.freeze

    def freeze_and_note(*args, **kwargs):
        frozen.append(freeze(*args, **kwargs))
        return frozen[-1]

    monkeypatch.setattr(torch.jit, "freeze", freeze_and_note)
    yield
    for module in frozen:
        neuron_ext.unload(module)


def _models():
    return sum(core.models for core in neuron_ext.core_stats())


@pytest.fixture
def idle_cores():
    """Nothing is loaded on any core: what other tests keep is unloaded until its next use."""
    if _models() != 0:
        gc.collect()
        for item in gc.get_objects():
            if issubclass(type(item), torch.jit.ScriptModule):
                neuron_ext.unload(item)
    assert _models() == 0


def _save(path, compiler):
    torch.jit.save(neuron_ext.trace(SmallNet().eval(), EXAMPLE, compiler=compiler), str(path))
    return path


@pytest.fixture(scope="session")
def torchscript_file(tmp_path_factory):
    """A saved portable `SmallNet`: quick to load."""
    return _save(tmp_path_factory.mktemp("models") / "torchscript.pt", "torchscript")


@pytest.fixture(scope="session")
def native_file(tmp_path_factory):
    """A saved native `SmallNet`. The first use compiles, which takes some ten seconds."""
    return _save(tmp_path_factory.mktemp("models") / "native.pt", "inductor")


@pytest.fixture
def small_net(torchscript_file):
    """A portable `SmallNet`, loaded for this test."""
    return torch.jit.load(str(torchscript_file))


@pytest.fixture
def native_net(native_file):
    """A native `SmallNet`, loaded for this test."""
    return torch.jit.load(str(native_file))


@pytest.fixture(scope="session")
def fork_server():
    """Runs code in processes that have imported neuron_ext and not used it, in some 20 ms each."""
    with ForkServer() as server:
        yield server
