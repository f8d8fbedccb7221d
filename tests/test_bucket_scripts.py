"""Main scripts that trace buckets, and what is left of their processes when they end."""

import re
import signal
import subprocess
import sys

import pytest
from bucket_worker_helpers import PATIENCE, is_gone, pid_in, wait_for
from helpers import TESTS, clean_environment, eventually

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys
import bucket_helpers
import torch
from neuron_ext.buckets import trace

trace.usable_cpus = lambda: 2

def func():
    print("func in", "parent" if os.getpid() == int(os.environ["THE_PARENT"]) else "worker")
    return bucket_helpers.make_pooled()

def main():
    os.environ["THE_PARENT"] = str(os.getpid())
    module = bucket_helpers.trace_buckets(func)
    x = bucket_helpers.inputs(5)
    assert torch.equal(module(*x), bucket_helpers.seeded_pooled()(*x))
    print("done")

"""


def run_script(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return subprocess.run(
        [sys.executable, str(path)],
        env=clean_environment({"TMPDIR": folder}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=folder,
        check=False,
    )


def test_a_script_with_a_guard(tmp_path):
    done = run_script(tmp_path, SCRIPT + 'if __name__ == "__main__":\n    main()\n')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["func in worker", "func in worker", "done", ""]


def test_a_script_without_a_guard(tmp_path):
    done = run_script(tmp_path, SCRIPT + "main()\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["func in parent", "func in parent", "done", ""]
    assert 'script.py has no `if __name__ == "__main__":`' in done.stderr


def test_a_script_with_its_work_outside_of_the_guard(tmp_path):
    done = run_script(tmp_path, SCRIPT + 'main()\nif __name__ == "__main__":\n    pass\n')
    assert done.returncode == 1
    assert re.search(r"RuntimeError: bucket [01]: its worker process \d+ ended with", done.stderr)
    assert "belongs below `if __name__" in done.stderr
    assert list(tmp_path.glob("neuron_ext-buckets-*")) == []


PAGE = re.findall(
    r"```python\n(.*?)```", (TESTS.parent / "docs" / "buckets.md").read_text(), re.DOTALL
)
PRINTED = [
    "torch.Size([1, 32, 4])\n",
    "".join(f"tensor([{n}., {n}., {n}., {n}.])\n" for n in (1, 2, 3)) + "tensor(12.)\ntensor(0.)\n",
]


@pytest.mark.parametrize("which", range(len(PRINTED)))
def test_the_examples_of_the_documentation(tmp_path, which):
    assert len(PAGE) == len(PRINTED)
    # Portable code is quicker to make.
    start = "import neuron_ext as torch_neuronx\n"
    assert start in PAGE[which]
    quick = f"{start}import functools\ntorch_neuronx.bucket_model_trace = functools.partial(\n"
    quick += '    torch_neuronx.bucket_model_trace, compiler="torchscript"\n)\n'
    done = run_script(tmp_path, PAGE[which].replace(start, quick))
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED[which]


PATIENT_SCRIPT = """
import signal, sys
from bucket_helpers import trace_buckets
from bucket_worker_helpers import each, wait_for_ever
from neuron_ext.buckets import trace

if __name__ == "__main__":
    trace.usable_cpus = lambda: 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    try:
        trace_buckets(wait_for_ever, configuration=each(sys.argv[1]))
    finally:
        print("blocked:", signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_script_is_that_of_its_workers(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(PATIENT_SCRIPT)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    output = tmp_path / "output"
    # Files, since pipes would stay open for as long as any process is left.
    with open(output, "w") as out:
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env=clean_environment({"TMPDIR": temporary}),
            stdout=out,
            stderr=out,
        )
        try:
            wait_for(tmp_path, "0", "1")
            assert list(temporary.glob("neuron_ext-buckets-*")) != []
            process.send_signal(how)
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -how, output.read_text()
    if how == signal.SIGINT:
        assert "blocked: set()" in output.read_text()
        assert output.read_text().rstrip().endswith("KeyboardInterrupt")
    for name in ("0", "1", "child-0", "child-1"):
        eventually(lambda name=name: is_gone(pid_in(tmp_path, name)))
    eventually(lambda: list(temporary.glob("neuron_ext-buckets-*")) == [])
