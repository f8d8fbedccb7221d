"""Wrote state_v1_held.pt, once: version 1 with the fields of held tensors, which came later.

Files of released versions are never rewritten.

NEURON_EXT_HOST_CORES=4 python tests/golden/make_state_v1_held.py
"""

from pathlib import Path

import torch

import neuron_ext


class GoldenHeld(torch.nn.Module):
    """Weights apart, one of them tied, and two states, one of them equal throughout; exact."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0, 4.0]), requires_grad=False)
        self.inner = torch.nn.Module()
        self.inner.same_scale = self.scale
        self.register_buffer("total", torch.tensor([0.5, 0.25, 0.125]))
        self.register_buffer("count", torch.full((2,), 7, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total = self.total + x * self.scale
        return total + self.inner.same_scale, total, self.count + 1


def main() -> None:
    model = GoldenHeld()
    trace = neuron_ext.trace(
        model,
        torch.zeros(3),
        compiler="torchscript",
        inline_weights_to_neff=False,
        input_output_aliases={model.total: 1, model.count: 2},
    )
    neuron_ext.set_neuron_cores(trace, start_nc=2)
    torch.jit.save(trace, Path(__file__).with_name("state_v1_held.pt"))


if __name__ == "__main__":
    main()
