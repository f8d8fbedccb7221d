"""The examples, run as a user would: the C++ ones are built against the installed package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TESTS, clean_environment, save

import neuron_ext

pytestmark = pytest.mark.slow

EXAMPLES = TESTS.parent / "examples"
CORES = 3
# Sentences that belong together, numbered as the examples print them.
GROUPS = [{1, 2, 3}, {4, 5, 6}, {7, 8}, {9, 10}]


def run(*command, cores=CORES, returncode=0, timeout=300):
    """Run a program and return what it printed, or its stderr if it is meant to fail."""
    done = subprocess.run(
        [str(part) for part in command],
        env=clean_environment({"NEURON_EXT_HOST_CORES": cores, "HF_HUB_OFFLINE": 1}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == returncode, f"{command}\n{done.stdout}\n--- stderr\n{done.stderr}"
    return done.stderr if returncode else done.stdout


def run_example(name, *options, **keywords):
    return run(sys.executable, EXAMPLES / "python" / name, *options, **keywords)


def find(pattern, text):
    """The groups of the one match of ``pattern``."""
    matches = re.findall(pattern, text, re.MULTILINE)
    assert len(matches) == 1, f"{len(matches)} times {pattern!r} in\n{text}"
    return matches[0]


def counts_by_core(text):
    """{0: 5, 1: 5} of "core 0: 5, core 1: 5"."""
    return {int(core): int(count) for core, count in re.findall(r"core (\d+): (\d+)", text)}


def assert_closest_in_group(closest):
    for group in GROUPS:
        assert {closest[sentence] for sentence in group} <= group


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the sentence encoder, compiled to native code, printed, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("demo")
    return run_example("sentence_encoder.py", "--compiler", "inductor", "--out", folder), folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of the built C++ examples."""
    build = tmp_path_factory.mktemp("build")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "the C++ examples are built with cmake"
    assert Path(neuron_ext.cmake_prefix_path, "NeuronExt").is_dir(), (
        "the C++ side of the package is not installed; run: pip install --no-build-isolation -e ."
    )
    prefixes = f"{neuron_ext.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    run(cmake, "-S", EXAMPLES / "cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={prefixes}")
    run(cmake, "--build", build, "--parallel", len(os.sched_getaffinity(0)))
    return build


def test_sentence_encoder_agrees_with_eager_pytorch(demo):
    text, folder = demo
    assert float(find(r"largest difference from eager PyTorch: (\S+)", text)) <= 1e-4
    embeddings = torch.load(folder / "embeddings.pt")
    assert embeddings.shape == (10, 384)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(10))
    # Only the trained weights give this.
    assert float(embeddings[0] @ embeddings[1]) == pytest.approx(0.58, abs=0.01)
    pairs = re.findall(r"(\d+)-(\d+)", find(r"closest: (.*)$", text))
    assert_closest_in_group({int(sentence): int(closest) for sentence, closest in pairs})


def test_sentence_encoder_runs_where_it_was_placed(demo):
    text, _ = demo
    assert len(re.findall(r"unloaded", text)) == 3
    ran = dict(
        re.findall(r"^  (\w+) +\d+ ms  loaded +executions: (.*[1-9].*)$", text, re.MULTILINE)
    )
    assert counts_by_core(ran["pinned"]) == {CORES - 1: 10}
    assert list(counts_by_core(ran["replicated"])) == list(range(CORES))
    assert sum(counts_by_core(ran["replicated"]).values()) == 10
    assert list(counts_by_core(ran["automatic"]).values()) == [10]
    stats = re.findall(
        r"^  core \d+: CPUs .* (\d+) models loaded, (\d+) executions", text, re.MULTILINE
    )
    assert len(stats) == CORES
    assert [sum(map(int, column)) for column in zip(*stats, strict=True)] == [CORES + 2, 30]


def test_sentence_encoder_saves_its_flags(demo):
    (status,) = neuron_ext.status(torch.jit.load(demo[1] / "encoder.pt"))
    assert (status.state, status.lazy_load, status.async_load) == ("unloaded", True, True)
    assert (status.start_nc, status.nc_count) == (-1, -1)


def test_sentence_encoder_on_one_core(tmp_path):
    text = run_example(
        "sentence_encoder.py", "--compiler", "torchscript", "--out", tmp_path, cores=1
    )
    assert float(find(r"largest difference from eager PyTorch: (\S+)", text)) <= 1e-4
    assert "core 0: CPUs" in text
    assert "core 1: CPUs" not in text


@pytest.mark.parametrize("cores", [1, CORES])
def test_cpp_sentence_encoder(demo, programs, cores):
    text = run(programs / "sentence_encoder", demo[1], cores=cores)
    assert find(r"^1\. Loaded onto core (\d+) of (\d+) cores$", text) == (
        str(cores - 1),
        str(cores),
    )
    assert re.findall(r"moved to core (\d+)", text) == [str(core) for core in range(cores)]
    executions = counts_by_core(text)
    assert len(executions) == cores
    assert sum(executions.values()) == 40
    assert find(r"^3\. Replicated onto core([ \d]+);", text).split() == list(map(str, range(cores)))
    rows = re.findall(r"^ +(\d+)  core (\d+)  closest: +(\d+) \((\S+)\)", text, re.MULTILINE)
    assert [int(core) for _, core, _, _ in rows] == [i % cores for i in range(10)]
    assert_closest_in_group({int(row[0]): int(row[2]) for row in rows})
    assert rows[0][2:] == ("2", "0.58")
    differences = re.findall(r"largest difference from Python: (\S+)", text)
    assert len(differences) == 2
    assert max(map(float, differences)) <= 1e-5


def test_cpp_sentence_encoder_fails_on_other_embeddings(demo, programs, tmp_path):
    shutil.copytree(demo[1], tmp_path, dirs_exist_ok=True)
    embeddings = torch.load(tmp_path / "embeddings.pt")
    embeddings[3, 100] += 1e-4
    torch.save(embeddings, tmp_path / "embeddings.pt")
    stderr = run(programs / "sentence_encoder", tmp_path, returncode=1)
    assert "not those of Python" in stderr


def test_cpp_sentence_encoder_without_its_input(programs, tmp_path):
    stderr = run(programs / "sentence_encoder", tmp_path, returncode=1)
    assert str(tmp_path) in stderr
    assert "run examples/python/sentence_encoder.py first" in stderr


def test_cpp_programs_need_no_python(programs):
    assert "libpython" not in run("ldd", programs / "sentence_encoder")


def test_run_model(programs, tmp_path):
    traced = neuron_ext.trace(
        lambda x, y: 2 * x + y, (torch.ones(3), torch.ones(3)), compiler="torchscript"
    )
    text = run(programs / "run_model", save(traced, tmp_path / "model.pt"))
    assert re.findall(r"^ 3$", text, re.MULTILINE) == [" 3"] * 3
    assert find(r"ran on core (\d+)$", text) == "0"


def test_run_model_says_what_is_wrong(programs, tmp_path):
    assert "usage" in run(programs / "run_model", returncode=2)
    missing = tmp_path / "missing.pt"
    assert str(missing) in run(programs / "run_model", missing, returncode=1)


def test_diffusion_pipeline(tmp_path):
    text = run_example("diffusion_pipeline.py", "--compiler", "torchscript", "--out", tmp_path)
    assert float(find(r"largest difference (\S+) from eager PyTorch", text)) <= 1e-3
    states = dict(re.findall(r"^  (\w+) +loaded on cores \[(.*)\]$", text, re.MULTILINE))
    assert sorted(states) == ["decoder", "post_quant_conv", "text_encoder", "unet"]
    assert states["unet"] == ", ".join(map(str, range(CORES)))
    executions = counts_by_core(find(r"^  unet executions (.*)$", text))
    assert sum(executions.values()) == 8
    for name in states:
        (status,) = neuron_ext.status(torch.jit.load(tmp_path / f"{name}.pt"))
        assert status.async_load
        assert status.lazy_load == (name == "unet")
