"""The compile cache between processes, and with native code that runs."""

import selectors

import torch
from helpers import PythonProcess, run_python
from trace_helpers import state_of

_SLOW = """
import sys
import torch, neuron_ext
from helpers import EXAMPLE, SmallNet
from neuron_ext.compiler import cache, inductor
from neuron_ext.compiler.executable import NativeCode

def compile_native(*_, **__):
    print("compiles")
    sys.stdin.readline()
    return NativeCode(torch.full((100,), int(sys.argv[1]), dtype=torch.uint8), None, [])

locked = cache.Store.locked
def tell(store, key):
    print("wants the lock")
    return locked(store, key)

inductor.compile_native = compile_native
cache.Store.locked = tell
traced = neuron_ext.trace(SmallNet().eval(), EXAMPLE, compiler="inductor")
print("has", traced.subgraph.__getstate__()[0][5]["code"][0].item())
sys.stdin.read()
"""


def _first_to_speak(processes):
    """One that has printed another line, as soon as there is one."""
    for process in processes:
        if b"\n" in process._pending:
            return process
    with selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process._process.stdout, selectors.EVENT_READ, process)
        ready = selector.select(120)
    assert ready, [process.stderr() for process in processes]
    return ready[0][0].data


def test_processes_that_want_the_same_compile_once_and_one_takes_over_from_a_killed_one(tmp_path):
    folder = tmp_path / "own"
    env = {"NEURON_EXT_CACHE_DIR": folder}
    with (
        PythonProcess(_SLOW, 1, env=env) as first,
        PythonProcess(_SLOW, 2, env=env) as second,
        PythonProcess(_SLOW, 3, env=env) as third,
    ):
        waiting = [first, second, third]
        for process in waiting:
            assert process.read_line() == "wants the lock"
        # Nobody has made anything yet: exactly one of them compiles.
        compiling = _first_to_speak(waiting)
        assert compiling.read_line() == "compiles"
        compiling.kill()
        waiting.remove(compiling)
        compiling = _first_to_speak(waiting)
        assert compiling.read_line() == "compiles"
        compiling.write_line()
        made = compiling.read_line()
        assert made == f"has {[first, second, third].index(compiling) + 1}"
        waiting.remove(compiling)
        assert waiting[0].read_line() == made
    (entry,) = folder.glob("*.entry")
    assert sorted(path.suffix for path in folder.iterdir()) == [entry.suffix, ".lock"]


_REAL = """
import json, sys
import torch, neuron_ext
from neuron_ext.compiler import aot_compile

compiled, compile_program = [], aot_compile._compile
aot_compile._compile = lambda flat, *rest, **options: (
    compiled.append(flat.name) or compile_program(flat, *rest, **options)
)
torch.manual_seed(1)
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Flatten(),
    torch.nn.Linear(16 * 6 * 6, 64),
).eval()
x = torch.randn(1, 3, 8, 8)
for path, flags in (("traced.pt", ""), ("portable.pt", "--portable-graph")):
    traced = neuron_ext.trace(net, x, compiler="inductor", compiler_args=flags)
    torch.jit.save(traced, path)
    with torch.no_grad():
        got, want = traced(x), net(x)
    torch.testing.assert_close(got, want)
    print(json.dumps(got.view(torch.int32).tolist()))
print(compiled, "torch._inductor.compile_fx" in sys.modules)
"""


def test_a_new_process_gets_the_same_native_code_and_compiles_nothing(tmp_path):
    folder = tmp_path / "own"
    files, printed = [], []
    for name in ("first", "second"):
        cwd = tmp_path / name
        cwd.mkdir()
        printed += run_python(
            _REAL, env={"NEURON_EXT_CACHE_DIR": folder}, cwd=cwd, timeout=300
        ).splitlines()
        files += [cwd / "traced.pt", cwd / "portable.pt"]
    assert [printed[2], printed[5]] == ["['Sequential'] True", "[] False"]
    assert len({*printed[0:2], *printed[3:5]}) == 1
    assert files[0].read_bytes() == files[2].read_bytes()
    states = [state_of(torch.jit.load(str(file)))[5] for file in files]
    for state, graph in zip(states, (False, True, False, True), strict=True):
        assert ("graph" in state) is graph
        for name in ("code", "weights"):
            assert torch.equal(state[name], states[0][name])
    # All of the file but the weights; most of that is code.
    assert files[0].stat().st_size - states[0]["weights"].numel() <= 300_000 * 1.02
