"""Wrote state_v1.pt, once, with the first release. Files of released versions are never rewritten.

NEURON_EXT_HOST_CORES=4 python tests/golden/make_state_v1.py
"""

from pathlib import Path

import torch

import neuron_ext


class Golden(torch.nn.Module):
    """A dict and a tensor in, a dict with a nested list out, with exact numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 4.0]))

    def forward(self, batch: dict[str, torch.Tensor], shift: torch.Tensor) -> dict[str, list]:
        scaled = batch["values"] * self.scale + shift
        return {"all": [scaled, scaled.sum()], "mask": [batch["mask"].float() + 0 * shift.sum()]}


def main() -> None:
    example = (
        {"values": torch.zeros(2, 3), "mask": torch.ones(2, dtype=torch.int64)},
        torch.zeros(3),
    )
    model = neuron_ext.trace(Golden(), example, compiler="torchscript")
    neuron_ext.lazy_load(model)
    neuron_ext.set_neuron_cores(model, start_nc=1)
    torch.jit.save(model, Path(__file__).with_name("state_v1.pt"))


if __name__ == "__main__":
    main()
