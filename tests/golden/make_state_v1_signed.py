"""Wrote state_v1_signed.pt, once, with the first release. Such files are never rewritten.

The key is that of the first example of RFC 8032, section 7.1.

NEURON_EXT_HOST_CORES=4 python tests/golden/make_state_v1_signed.py
"""

import tempfile
from pathlib import Path

import torch

import neuron_ext

KEY = """-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g
-----END PRIVATE KEY-----
"""


class GoldenSigned(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x + 1


def main() -> None:
    model = neuron_ext.trace(GoldenSigned(), torch.zeros(3), compiler="torchscript")
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as key:
        key.write(KEY)
        key.flush()
        neuron_ext.sign(model, key.name)
    torch.jit.save(model, Path(__file__).with_name("state_v1_signed.pt"))


if __name__ == "__main__":
    main()
