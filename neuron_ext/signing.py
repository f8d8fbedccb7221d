"""Signatures of subgraphs, so that a process runs native code of known authors only.

Ed25519 (RFC 8032), computed by OpenSSL's ``libcrypto``. Keys are PEM files as OpenSSL writes them::

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem

A process with ``NEURON_EXT_NATIVE_CODE=signed`` and ``NEURON_EXT_TRUSTED_KEYS=public.pem`` loads no
other native code.
"""

from __future__ import annotations

import os

import torch

from neuron_ext._library import ops
from neuron_ext._subgraphs import find_subgraphs, holder


def sign(module: torch.nn.Module, private_key: str | os.PathLike[str]) -> str:
    """Signs every subgraph of ``module``; ``torch.jit.save`` then saves the signatures with it.

    A signature covers what a subgraph computes: its code, weights, portable graph, inputs, outputs
    and initial state. It does not cover its flags and placement, tensors that stand in the module
    (separated weights), or the TorchScript around it. It replaces an earlier one, and counts for
    copies of ``module`` in this process too. Thread-safe.

    Args:
        module: a module with traced subgraphs.
        private_key: a PEM file with an Ed25519 private key that is not encrypted.

    Returns:
        The public key, 64 hexadecimal digits.

    Raises:
        ValueError: ``module`` has no subgraphs, or ``private_key`` is no such file. Nothing is
            signed.
        RuntimeError: there is no ``libcrypto`` of OpenSSL 1.1.1 or later.
    """
    if not find_subgraphs(module):
        raise ValueError("the module has no subgraph to sign")
    return str(ops.sign(holder(module), os.fspath(private_key)))


def verify(module: torch.nn.Module, public_keys: str | os.PathLike[str]) -> None:
    """Returns if every subgraph of ``module`` is signed by one of ``public_keys``.

    Compares the SHA-256 of all contents with what was signed. Loads and runs no subgraph; but
    ``torch.jit.load`` of the module did, unless it is lazy or ``NEURON_EXT_NATIVE_CODE=signed`` is
    set, which checks before it loads. Thread-safe.

    Args:
        module: a module with traced subgraphs; for one without any there is nothing to verify.
        public_keys: a PEM file with Ed25519 public keys, one or several.

    Raises:
        RuntimeError: a subgraph is not signed, or by another key, or is not what was signed; or
            there is no ``libcrypto``.
        ValueError: ``public_keys`` is no such file.
    """
    ops.verify(holder(module), os.fspath(public_keys))
