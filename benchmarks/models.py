"""The models of the suite, and their traced files."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness.measure import in_new_process
from benchmarks.harness.options import REPOSITORY, Options

DIFFUSION = (
    "diffusion.text_encoder",
    "diffusion.unet",
    "diffusion.post_quant_conv",
    "diffusion.decoder",
)
# What decides what the models are.
SOURCES = (Path(__file__), *sorted((REPOSITORY / "examples" / "python").glob("*.py")))
NAMES = (
    *("affine", "mlp", "resnet50", "bert", "minilm", "minilm_batch8", "small_convolutions"),
    *DIFFUSION,
)

Model = Callable[..., torch.Tensor]
SMALL_BLOCKS = 18
SMALL_CONVOLUTIONS = 3 * SMALL_BLOCKS


class Affine(torch.nn.Module):
    """The smallest model: what is left is the cost of a call."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2 * x + y


class SmallBlock(torch.nn.Module):
    """A block as ResNet-50 has them, of three convolutions with hardly any arithmetic: what is left
    is what a convolution costs besides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduce = torch.nn.Conv2d(32, 32, 1)
        self.middle = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.expand = torch.nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.middle(torch.relu(self.reduce(x))))
        return torch.relu(x + self.expand(y))


class Output(torch.nn.Module):
    """One field of what a transformers model returns."""

    def __init__(self, model: torch.nn.Module, field: str) -> None:
        super().__init__()
        self.model = model
        self.field = field

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = getattr(self.model(inputs), self.field)
        return output


def build(name: str) -> tuple[Model, tuple[torch.Tensor, ...]]:
    """The eager model in eval mode, without gradients, and its example inputs; always the same.

    All but the parts of the diffusion pipeline are modules. Sets torch's seed.

    Raises:
        ValueError: there is no such model.
    """
    torch.manual_seed(0)
    if name == "affine":
        model, inputs = Affine(), (torch.rand(3), torch.rand(3))
    elif name == "mlp":
        model, inputs = _mlp()
    elif name == "resnet50":
        from transformers import ResNetConfig, ResNetForImageClassification

        model = Output(ResNetForImageClassification(ResNetConfig()), "logits")
        inputs = (torch.rand(1, 3, 224, 224),)
    elif name == "bert":
        from transformers import BertConfig, BertModel

        config = BertConfig(attn_implementation="sdpa")
        model = Output(BertModel(config, add_pooling_layer=False), "last_hidden_state")
        inputs = (torch.randint(config.vocab_size, (1, 128)),)
    elif name in ("minilm", "minilm_batch8"):
        model, ids, mask = _example("sentence_encoder").load_model()
        batch = 8 if name == "minilm_batch8" else 1
        inputs = (ids[:batch], mask[:batch])
    elif name == "small_convolutions":
        model = torch.nn.Sequential(*(SmallBlock() for _ in range(SMALL_BLOCKS)))
        inputs = (torch.rand(1, 32, 2, 2),)
    elif name in DIFFUSION:
        return _diffusion(name)
    else:
        raise ValueError(f"no model {name!r}; there are: {', '.join(NAMES)}")
    return model.eval().requires_grad_(False), inputs


def _mlp() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    layers: list[torch.nn.Module] = []
    for _ in range(8):
        layers += [torch.nn.Linear(1024, 1024), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers), (torch.randn(16, 1024),)


def _diffusion(name: str) -> tuple[Model, tuple[torch.Tensor, ...]]:
    example = _example("diffusion_pipeline")
    latents = torch.randn(1, 4, 32, 32)
    text = torch.randn(1, example.TOKENS, example.WIDTH)
    inputs = {
        "text_encoder": (torch.zeros(1, example.TOKENS, dtype=torch.long),),
        "unet": (latents, torch.tensor(1), text),
        "post_quant_conv": (latents,),
        "decoder": (latents,),
    }
    part = name.removeprefix("diffusion.")
    model: Model = example.build_models()[part]
    return model, inputs[part]


def _example(name: str) -> ModuleType:
    """A script of ``examples/python``, as a module: the models are those that the examples show."""
    spec = importlib.util.spec_from_file_location(
        name, REPOSITORY / "examples" / "python" / f"{name}.py"
    )
    if spec is None or spec.loader is None:
        raise RuntimeError(f"examples/python/{name}.py is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def traced(name: str, options: Options, compiler_args: str = "") -> Path:
    """The saved file of a model, traced in a process of its own at the first need and then kept.

    The name of the file holds a digest of the model's name, the flags, the versions of the packages
    and the sources that take part, so that a stale one is never taken.
    """
    flags = "".join(c if c.isalnum() else "_" for c in compiler_args)
    stem = "-".join(filter(None, [name, flags, source_digest()]))
    file = options.workdir / "models" / f"{stem}.pt"
    if not file.exists():
        print(f"  tracing {name} {compiler_args}".rstrip(), file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        in_new_process(
            "benchmarks.models:trace_to", name=name, file=str(file), compiler_args=compiler_args
        )
    return file


def trace_to(name: str, file: str, compiler_args: str, **more: Any) -> None:
    """Traces a model in this process, and saves it."""
    import neuron_ext

    model, inputs = build(name)
    # Its default falls back to a portable graph where no compiler works: not what is measured.
    trace = neuron_ext.trace(
        model, inputs, compiler_args=compiler_args or None, compiler="inductor", **more
    )
    part = f"{file}.{os.getpid()}"
    torch.jit.save(trace, part)
    os.replace(part, file)


def source_digest() -> str:
    """Of what decides what is in a traced file."""
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    package = REPOSITORY / "neuron_ext"
    for path in sorted([*package.glob("_*.py"), *package.glob("compiler/*.py"), *SOURCES]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
