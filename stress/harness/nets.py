"""Small models whose outputs are known exactly, and the files that scenarios load."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import neuron_ext

EXAMPLE = torch.arange(6.0).reshape(2, 3)
"""What the models are traced with: (rows, 3), float32."""
SETS = 2
"""How many sets of weights there are, numbered from 0."""


class Net(torch.nn.Module):
    """Small whole numbers, which add up exactly in any order: outputs can be compared with ==.

    The sets of weights differ in weight and bias, so that some of each would give neither output.
    """

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        weight, bias = _parameters(number)
        self.weight = torch.nn.Parameter(weight.to(torch.float32), requires_grad=False)
        self.bias = torch.nn.Parameter(bias.to(torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.nn.functional.linear(x, self.weight, self.bias))


def _parameters(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.arange(12).reshape(4, 3) - 5
    return weight * (1 + 2 * number), torch.arange(4) + 1000 * number


def expected(x: torch.Tensor, number: int = 0) -> torch.Tensor:
    """What `Net` gives, computed without it and in whole numbers."""
    weight, bias = _parameters(number)
    product = (x.to(torch.int64).unsqueeze(1) * weight).sum(-1)
    return (product + bias).clamp(min=0).to(torch.float32)


def numbered(i: int, rows: int = 2) -> torch.Tensor:
    """An input whose output belongs to no other ``i``."""
    return torch.arange(3.0 * rows).reshape(rows, 3) + 8 * i


def save(module: torch.nn.Module, target: object) -> None:
    """`torch.jit.save` without PyTorch's warning of its own age."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, target)


def make_files(folder: Path, native: bool) -> None:
    """Traces the models into ``folder``: portable.pt, native.pt, weights.pt (separated ones).

    Without ``native``, all of them are portable.
    """
    folder.mkdir(parents=True)
    compiler = "inductor" if native else "torchscript"
    for name, traced in (
        ("portable", neuron_ext.trace(Net().eval(), EXAMPLE, compiler="torchscript")),
        ("native", neuron_ext.trace(Net().eval(), EXAMPLE, compiler=compiler)),
        (
            "weights",
            neuron_ext.trace(
                Net().eval(), EXAMPLE, compiler=compiler, inline_weights_to_neff=False
            ),
        ),
    ):
        save(traced, str(folder / f"{name}.pt"))
