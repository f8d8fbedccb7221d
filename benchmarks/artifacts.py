"""What the peers load: each model in the formats of the peers, made once and then kept."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness.measure import in_new_process
from benchmarks.harness.options import Options
from benchmarks.models import SOURCES, build

# What a format depends on besides the model: the packages, and this file.
_FORMATS = {
    "data": (".npz", ()),
    "script": (".pt", ()),
    "package": (".pt2", ()),
    "package_2_threads": (".pt2", ()),
    "onnx": (".onnx", ("onnx", "onnxscript")),
    "openvino": (".xml", ("openvino",)),
}


def artifact(format: str, name: str, options: Options) -> Path:
    """The file of a model in a format, made in a process of its own at the first need.

    Formats: ``"data"`` holds the example inputs and what the eager model answers; ``"script"`` is
    the plain ScriptModule of ``torch.jit.trace``; ``"package"`` is what ``aoti_load_package``
    loads, for one intra-op thread, and ``"package_2_threads"`` for two; ``"onnx"``; ``"openvino"``,
    an ``.xml`` with its ``.bin`` beside it.
    """
    ending, packages = _FORMATS[format]
    digest = hashlib.sha256()
    for source in (Path(__file__), *SOURCES):
        digest.update(source.read_bytes())
    for package in ("torch", "transformers", *packages):
        digest.update(version(package).encode())
    file = options.workdir / "peers" / f"{name}-{format}-{digest.hexdigest()[:12]}{ending}"
    if not file.exists():
        print(f"  making {format} of {name}", file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"part-{os.getpid()}-{file.name}")
        in_new_process("benchmarks.artifacts:make", format=format, name=name, file=str(part))
        if format == "openvino":
            os.replace(part.with_suffix(".bin"), file.with_suffix(".bin"))
        os.replace(part, file)
    return file


def make(format: str, name: str, file: str) -> None:
    """Writes ``file`` in this process."""
    import torch

    model, inputs = build(name)
    assert isinstance(model, torch.nn.Module), f"{name} is for no peer"
    with torch.inference_mode():
        expected = model(*inputs)
    if format == "data":
        import numpy

        arrays = {f"input{number}": tensor.numpy() for number, tensor in enumerate(inputs)}
        numpy.savez(file, expected=expected.numpy(), **arrays)
    elif format == "script":
        with torch.inference_mode(False):
            torch.jit.save(torch.jit.trace(model, inputs), file)
    elif format in ("package", "package_2_threads"):
        # Freezing is not the default, and makes it a better peer: packed weights. It is left out
        # without a word where gradients are on. The number of threads is fixed in the code, and
        # decides how the weights are packed.
        threads = 1 if format == "package" else 2
        torch.set_num_threads(threads)
        configs = {"freezing": True, "cpp.threads": threads}
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                torch.export.export(model, inputs), package_path=file, inductor_configs=configs
            )
    elif format == "onnx":
        torch.onnx.export(model, inputs, file, dynamo=True, external_data=False)
    elif format == "openvino":
        import openvino

        converted = openvino.convert_model(model, example_input=inputs)
        # Fixed shapes, as everybody else gets; not its default of float16 weights.
        shapes = {number: list(tensor.shape) for number, tensor in enumerate(inputs)}
        converted.reshape(shapes)
        openvino.save_model(converted, file, compress_to_fp16=False)
    else:
        raise ValueError(f"no format {format!r}; there are: {', '.join(_FORMATS)}")
