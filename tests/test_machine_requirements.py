"""Native code runs only where it fits and is allowed; it is not even mapped elsewhere."""

import functools
import platform

import pytest
import torch
from helpers import EXAMPLE, bytes_of, expected, flip_byte, rebuild, run_each, save
from trace_helpers import assert_same, loaded, native_with_graph, saved_bytes, state_of

import neuron_ext

TORCH = torch.__version__.split("+")[0]


@pytest.fixture
def run(fork_server):
    return functools.partial(run_each, fork_server)


@pytest.fixture(scope="module")
def with_graph():
    """A native module that carries a portable graph, never loaded."""
    module = loaded(native_with_graph())
    neuron_ext.unload(module)
    return module


def _other(module, what):
    """A copy of a native module that asks for what is not here, and how the error names that."""
    needs = state_of(module)[4]["cpu_features"]
    changes, named = {
        "CPU features": (
            {"string_lists": {"cpu_features": [*needs, "neverheardof", "norofthis"]}},
            "it was compiled for CPU features that this machine lacks (neverheardof, norofthis); "
            f"it needs {', '.join([*needs, 'neverheardof', 'norofthis'])}",
        ),
        "architecture": (
            {"strings": {"arch": "pdp11"}},
            f"it was compiled for pdp11 and this machine is {platform.machine()}",
        ),
        "torch": (
            {"strings": {"torch_version": "1.4.0"}},
            f"it was compiled by torch 1.4.0 and this is torch {TORCH}",
        ),
        "newer torch": (
            {"strings": {"torch_version": "2.130.0"}},
            f"it was compiled by torch 2.130.0 and this is torch {TORCH}",
        ),
    }[what]
    return changes, named


WHATS = ["CPU features", "architecture", "torch", "newer torch"]
REMEDY = (
    "It carries no portable graph to fall back on: trace it again on such a machine as this, or "
    'with compiler="torchscript", or with compiler_args="--portable-graph"'
)


def _lazy(changes):
    return {**changes, "ints": {"lazy_load": 1}}


def test_native_code_for_another_machine_is_refused_before_it_is_mapped(native_file, tmp_path, run):
    native = torch.jit.load(str(native_file))
    files, messages = [], []
    for i, what in enumerate(WHATS):
        changes, named = _other(native, what)
        files.append(save(rebuild(native, **changes), tmp_path / f"{i}.pt"))
        said = f"subgraph 'SmallNet' has native code that cannot run here: {named}. {REMEDY}"
        messages.append((said, 0))
    assert run(*files, native_file) == [*messages, ("right", 1)]


def test_a_refused_module_can_be_held_unloaded_and_says_again_why_it_cannot_run(native_net):
    changes, named = _other(native_net, "architecture")
    module = loaded(saved_bytes(rebuild(native_net, **_lazy(changes))))
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            module(EXAMPLE)
        assert named in str(caught.value)
    (status,) = neuron_ext.status(module)
    assert (status.state, status.cores) == ("failed", [])
    assert named in status.error


def test_a_portable_graph_runs_where_the_native_code_cannot(with_graph, tmp_path, run, fork_server):
    files, messages = [], []
    for i, what in enumerate(WHATS):
        changes, named = _other(with_graph, what)
        files.append(save(rebuild(with_graph, **changes), tmp_path / f"{i}.pt"))
        messages.append(
            "subgraph 'SmallNet' runs its portable graph, not its native code: " + named
        )
    before = len(fork_server.stderr())
    assert run(*files, NEURON_RT_LOG_LEVEL="warning") == [("right", 0)] * len(WHATS)
    logged = fork_server.stderr()[before:].splitlines()
    assert len(logged) == len(WHATS)
    for line, message in zip(logged, messages, strict=True):
        assert line.endswith(message)


def test_another_patch_version_of_torch_is_no_obstacle(native_net):
    major_minor = TORCH.rsplit(".", 1)[0]
    module = rebuild(native_net, strings={"torch_version": f"{major_minor}.99"})
    assert_same(module(EXAMPLE), expected())


def test_missing_requirements_of_native_code_are_an_error(native_net):
    for field in ("arch", "torch_version"):
        with pytest.raises(RuntimeError, match=rf"field '{field}' is missing"):
            rebuild(native_net, strings={field: None})


# ------------------------------------------------------------------------------- NATIVE_CODE


@pytest.fixture(scope="module")
def three_files(native_file, torchscript_file, tmp_path_factory):
    """Native only, native with a portable graph, portable only."""
    both = tmp_path_factory.mktemp("models") / "both.pt"
    both.write_bytes(native_with_graph())
    return native_file, both, torchscript_file


def test_native_code_can_be_denied(three_files, run):
    denied = (
        "subgraph 'SmallNet' has native code that cannot run here: NEURON_EXT_NATIVE_CODE=deny "
        f"forbids native code. {REMEDY}"
    )
    for value in ("deny", "DENY"):
        answers = run(*three_files, NEURON_EXT_NATIVE_CODE=value)
        assert answers == [(denied, 0), ("right", 0), ("right", 0)]


def test_native_code_can_be_allowed(three_files, run):
    for files in (three_files, three_files[1:]):
        (first, mapped), *others = run(*files, NEURON_EXT_NATIVE_CODE="allow")
        assert (first, mapped) == ("right", 1)
        assert [said for said, _ in others] == ["right"] * len(others)


def test_an_unknown_value_of_native_code_runs_nothing(three_files, run):
    native, both, _ = three_files
    for value in ("no", ""):
        message = (
            f"NEURON_EXT_NATIVE_CODE='{value}' is not understood: expected one of allow, signed, "
            "deny, or unset it"
        )
        assert run(native, both, NEURON_EXT_NATIVE_CODE=value) == [(message, 0)] * 2


# ------------------------------------------------------------------------------- digests


def _with_checksum(module, name):
    """A copy of ``module`` with one changed byte in ``name``, and the checksum that fits it."""
    tensor = bytes_of(module, name).clone()
    flip_byte(tensor)
    # A checksum that is missing is computed, as for a fresh trace: saving writes it down.
    return rebuild(module, tensors={name: tensor}, ints={f"checksum_{name}": None})


def _damaged_message(name):
    return (
        f"the {name} of subgraph 'SmallNet' is damaged: its bytes do not have the digest saved "
        "with them; get the file again, or trace again"
    )


def test_validate_hash_catches_a_change_whose_checksum_was_adjusted(
    native_net, small_net, tmp_path, run
):
    weights = save(_with_checksum(native_net, "weights"), tmp_path / "weights.pt")
    graph = save(_with_checksum(small_net, "graph"), tmp_path / "graph.pt")
    assert run(weights, graph, NEURON_RT_VALIDATE_HASH="TRUE") == [
        (_damaged_message("weights"), 0),
        (_damaged_message("portable graph"), 0),
    ]


def test_validate_hash_accepts_what_is_whole(three_files, run):
    for value in ("TRUE", "1", "false"):
        answers = run(*three_files, NEURON_RT_VALIDATE_HASH=value)
        assert [said for said, _ in answers] == ["right"] * 3


def test_an_unknown_value_of_validate_hash_runs_nothing(three_files, run):
    message = (
        "NEURON_RT_VALIDATE_HASH='maybe' is not understood: expected one of true, false, 1, 0, "
        "or unset it"
    )
    assert run(*three_files, NEURON_RT_VALIDATE_HASH="maybe") == [(message, 0)] * 3


@pytest.mark.parametrize("position", [0, 100, -1])
def test_one_changed_byte_of_native_code_is_found_before_it_is_mapped(
    native_net, tmp_path, position, run
):
    code = bytes_of(native_net, "code").clone()
    flip_byte(code, position)
    file = save(rebuild(native_net, tensors={"code": code}), tmp_path / "code.pt")
    assert run(file) == [(_damaged_message("native code"), 0)]


@pytest.mark.parametrize("name", ["weights", "graph"])
@pytest.mark.parametrize("position", [0, 7, 8, 1001, -9, -1])
def test_one_changed_byte_of_weights_or_graph_is_found(native_net, small_net, name, position):
    module = {"weights": native_net, "graph": small_net}[name]
    tensor = bytes_of(module, name).clone()
    flip_byte(tensor, position if abs(position) < tensor.numel() else tensor.numel() // 3)
    what = {"weights": "weights", "graph": "portable graph"}[name]
    damaged = rebuild(module, tensors={name: tensor})
    with pytest.raises(RuntimeError) as caught:
        damaged(EXAMPLE)
    assert _damaged_message(what) in str(caught.value)
