"""What several test files need. Holds no tests."""

import platform
import warnings

import torch
from helpers_processes import (
    PACKAGE_ROOT,
    TESTS,
    ChildError,
    ForkServer,
    FullStderr,
    PythonProcess,
    clean_environment,
    run_python,
)
from helpers_threads import Gate, eventually, gated_net, run_threads

import neuron_ext

__all__ = [
    "EXAMPLE",
    "PACKAGE_ROOT",
    "TESTS",
    "ChildError",
    "CoreCounter",
    "ForkServer",
    "FullStderr",
    "Gate",
    "Pair",
    "PythonProcess",
    "SmallNet",
    "bytes_of",
    "clean_environment",
    "damaged",
    "eventually",
    "executed_by",
    "expected",
    "falls_back",
    "flagged",
    "flip_byte",
    "gated_net",
    "input_number",
    "only_status",
    "rebuild",
    "run_python",
    "run_threads",
    "save",
    "trace_small_net",
    "wrap",
]

EXAMPLE = torch.arange(6.0).reshape(2, 3)


class SmallNet(torch.nn.Module):
    """Small whole numbers, which add up exactly in any order: outputs can be compared with ==."""

    def __init__(self, shift=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3) - 5, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.arange(4.0) + shift, requires_grad=False)

    def forward(self, x):
        return torch.relu(torch.nn.functional.linear(x, self.weight, self.bias))


class Pair(torch.nn.Module):
    """The sum of what two modules make of one tensor."""

    def __init__(self, first, second):
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x):
        return self.first(x) + self.second(x)


def expected(x=EXAMPLE, shift=0):
    """What `SmallNet` gives, computed without it and in whole numbers."""
    weight = torch.arange(12).reshape(4, 3) - 5
    product = (x.to(torch.int64).unsqueeze(1) * weight).sum(-1)
    return (product + torch.arange(4) + shift).clamp(min=0).to(torch.float32)


def input_number(i):
    """An input whose `SmallNet` output belongs to no other ``i`` below some thousands."""
    return EXAMPLE + i


def trace_small_net(shift=0, **options):
    """A portable `SmallNet`, traced now."""
    return neuron_ext.trace(
        SmallNet(shift).eval(), EXAMPLE, **{"compiler": "torchscript", **options}
    )


def save(module, path):
    """Save without torch's warning of its own age; returns ``path``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, str(path))
    return path


# ------------------------------------------------------------------------------- which core did it


class CoreCounter:
    """Tells which cores executed since the last time it was asked."""

    def __init__(self):
        self._before = self._counts()

    @staticmethod
    def _counts():
        return [core.executions for core in neuron_ext.core_stats()]

    def since(self):
        """Executions per core since the last call."""
        now = self._counts()
        before, self._before = self._before, now
        return [a - b for a, b in zip(now, before, strict=True)]

    def core_of(self, call):
        """Run ``call``, and return the one core that executed one inference for it."""
        self.since()
        call()
        counts = self.since()
        assert sorted(counts) == [0] * (len(counts) - 1) + [1], f"not one execution, but {counts}"
        return counts.index(1)

    def cores_of(self, call, times):
        return [self.core_of(call) for _ in range(times)]


def only_status(module):
    """The status of the one subgraph of ``module``."""
    (status,) = neuron_ext.status(module)
    return status


def executed_by(module, call):
    """The core on which ``call`` made the one subgraph of ``module`` execute, by its own count."""
    before = only_status(module)
    call()
    after = only_status(module)
    assert after.cores == before.cores
    counts = [a - b for a, b in zip(after.executions, before.executions, strict=True)]
    assert sorted(counts) == [0] * (len(counts) - 1) + [1], f"not one execution, but {counts}"
    return after.cores[counts.index(1)]


# ------------------------------------------------------------------------------- altered files


def rebuild(
    module,
    *,
    version=None,
    ints=None,
    strings=None,
    int_lists=None,
    string_lists=None,
    tensors=None,
):
    """A module around a copy of the one subgraph of ``module`` with other state.

    Each argument updates the bag of that name; a value of None takes the field out. The subgraph
    must be one of a function of one tensor to one tensor. It is not loaded.
    """
    (subgraph,) = neuron_ext._subgraphs.find_subgraphs(module)
    state = subgraph.__getstate__()[0]
    bags = [dict(bag) for bag in state[1:]]
    for bag, changes in zip(bags, (ints, strings, int_lists, string_lists, tensors), strict=True):
        bag.update(changes or {})
        for name in [name for name, value in bag.items() if value is None]:
            del bag[name]
    held = torch.classes.neuron_ext.NeuronSubgraph(state[0] if version is None else version, *bags)
    return wrap(held)


class _Shell(torch.nn.Module):
    def forward(self, x):
        return torch.ops.neuron_ext.forward([x], self.subgraph)[0]


def wrap(subgraph):
    """A ScriptModule whose forward is that of ``subgraph``, of one tensor to one tensor."""
    shell = _Shell()
    shell.subgraph = subgraph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(shell.eval())


def bytes_of(module, name):
    """The tensor ``name`` ("graph", "code", "weights") of the one subgraph: no copy of it."""
    (subgraph,) = neuron_ext._subgraphs.find_subgraphs(module)
    return subgraph.__getstate__()[0][5][name]


def flip_byte(tensor, position=None):
    """Damage ``tensor`` in place; the same again repairs it."""
    at = tensor.numel() // 2 if position is None else position
    tensor[at] ^= 0xFF


def damaged(module, name):
    """`rebuild` with one byte of the tensor ``name`` flipped."""
    tensor = bytes_of(module, name).clone()
    flip_byte(tensor)
    return rebuild(module, tensors={name: tensor})


def falls_back(module):
    """`rebuild` as a native subgraph whose portable graph is that of the portable ``module``.

    Its native code is junk: it loads only with NEURON_EXT_NATIVE_CODE=deny, and logs a warning.
    """
    return rebuild(
        module,
        strings={
            "format": "inductor",
            "arch": platform.machine(),
            "torch_version": torch.__version__.split("+")[0],
            "sha256_code": "0" * 64,
        },
        tensors={"code": torch.zeros(16, dtype=torch.uint8)},
    )


def flagged(module, *, lazy=None, asynchronous=None):
    """A copy of ``module`` that is not loaded, with other flags."""
    changes = {"lazy_load": lazy, "async_load": asynchronous}
    return rebuild(
        module, ints={name: int(flag) for name, flag in changes.items() if flag is not None}
    )


_RUN_EACH = """
import helpers
result = []
for path in args:
    try:
        module = torch.jit.load(path)
        assert torch.equal(module(helpers.EXAMPLE), helpers.expected())
        said = "right"
    except RuntimeError as error:
        said = str(error).splitlines()[0]
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[4] for line in maps if "memfd:neuron_ext" in line}
    result.append([said, len(mapped)])
"""


def run_each(fork_server, *files, **env):
    """Loads and runs each file of a `SmallNet` in turn in one new process.

    Returns for each what was said, and how many libraries out of files are mapped by then.
    """
    answers = fork_server.run(_RUN_EACH, *map(str, files), env=env)
    return [tuple(answer) for answer in answers]
