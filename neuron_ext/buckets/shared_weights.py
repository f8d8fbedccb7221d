"""One copy of the weights that buckets have in common.

The weights of native code are one blob of bytes with a table of offsets (``docs/state_format.md``).
Here the blobs of several subgraphs become one, which holds each distinct constant once, and all of
them refer to that same tensor: in memory, and in a saved file, since PyTorch writes a storage once
however many tensors refer to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from neuron_ext._trace import State

# That of the blobs which AOTInductor writes, and enough for oneDNN.
_ALIGNMENT = 64


class _Blob:
    """Distinct constants, one after another."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, bytes], int] = {}
        self._pieces: list[tuple[int, torch.Tensor]] = []
        self._end = 0

    def place(self, piece: torch.Tensor) -> int:
        """The offset of these bytes, which are added if they are not there yet."""
        key = (piece.numel(), hashlib.sha256(piece.numpy().data).digest())
        if key not in self._places:
            self._places[key] = self._end
            self._pieces.append((self._end, piece))
            self._end += -(-piece.numel() // _ALIGNMENT) * _ALIGNMENT
        return self._places[key]

    def joined(self) -> torch.Tensor:
        whole = torch.zeros(self._end, dtype=torch.uint8)
        for offset, piece in self._pieces:
            whole[offset : offset + piece.numel()] = piece
        return whole


def share_weights(states: Sequence[State]) -> list[State]:
    """The same states, with one tensor of weights among all of those that have weights.

    States without a ``weights`` tensor come back as they are; of the others a new one is made, and
    the given ones are not changed.
    """
    blob = _Blob()
    offsets: list[list[int] | None] = []
    for _, _, _, int_lists, _, tensors in states:
        weights = tensors.get("weights")
        if weights is None or weights.numel() == 0:
            offsets.append(None)
            continue
        starts, sizes = int_lists["constant_offsets"], int_lists["constant_sizes"]
        offsets.append(
            [
                blob.place(weights[start : start + size])
                for start, size in zip(starts, sizes, strict=True)
            ]
        )
    if all(one is None for one in offsets):
        return list(states)
    merged = blob.joined()
    digest = hashlib.sha256(merged.numpy().data).hexdigest()
    return [
        state if mine is None else _with_weights(state, merged, digest, mine)
        for state, mine in zip(states, offsets, strict=True)
    ]


def _with_weights(
    state: State, weights: torch.Tensor, digest: str, offsets: Sequence[int]
) -> State:
    version, ints, strings, int_lists, string_lists, tensors = state
    # Digests of the old bytes and of the fields; the library makes them again when it saves.
    stale = ("checksum_weights", "sha256_state")
    return (
        version,
        {name: value for name, value in ints.items() if name not in stale},
        {name: value for name, value in strings.items() if name not in stale}
        | {"sha256_weights": digest},
        {**int_lists, "constant_offsets": list(offsets)},
        string_lists,
        {**tensors, "weights": weights},
    )
