"""Native code from the compile cache, or compiled and put there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from neuron_ext.compiler.cache import Entry, Store
from neuron_ext.compiler.cache_key import NotKeyableError, compile_key
from neuron_ext.compiler.executable import Constant, NativeCode, UnsupportedOperatorsError

_log = logging.getLogger("neuron_ext")


def cached_compile(
    program: torch.export.ExportedProgram,
    settings: Mapping[str, Any],
    compile_native: Callable[[], NativeCode],
    *,
    store: Store | None,
    reuse: bool,
    level: int,
) -> NativeCode:
    """What ``compile_native`` returns for ``program`` and TorchInductor's ``settings``, from the
    store if it is there, else compiled and kept in the store.

    Where several processes want the same, one compiles and the others wait for it.

    Args:
        program: what is compiled, not changed.
        settings: of TorchInductor, over those in force, and what else the code depends on.
        compile_native: compiles ``program`` with ``settings``.
        store: None to compile without.
        reuse: False to compile whatever the store holds.
        level: of the log line that says what was found.

    Raises:
        UnsupportedOperatorsError: if ``compile_native`` raises it, or once did.
    """
    if store is None:
        return compile_native()
    before = _versions(program)
    try:
        key = compile_key(program, settings)
    except NotKeyableError as error:
        _log.log(level, "compile cache: not used, since %s", error)
        return compile_native()
    if reuse:
        found = _find(store, key, level)
        if found is not None:
            return found
    with store.locked(key) if reuse else contextlib.nullcontext():
        if reuse:
            # Another process may have been at it.
            found = _find(store, key, level)
            if found is not None:
                return found
        _log.log(level, "compile cache: miss, key %s", key)
        try:
            native = compile_native()
        except UnsupportedOperatorsError as error:
            store.write(key, Entry({"unsupported": error.operators}, {}))
            raise
        # Weights that changed meanwhile are not those of the key.
        if _versions(program) == before:
            entry = _to_entry(native)
            store.write(key, entry)
            native.digests.update(entry.digests)
    return native


def _find(store: Store, key: str, level: int) -> NativeCode | None:
    entry = store.read(key)
    if entry is None:
        return None
    _log.log(level, "compile cache: hit, key %s", key)
    if "unsupported" in entry.fields:
        raise UnsupportedOperatorsError(entry.fields["unsupported"])
    return _from_entry(entry)


def _to_entry(native: NativeCode) -> Entry:
    constants = []
    for one in native.constants:
        fields = dataclasses.asdict(one)
        constants.append({**fields, "opaque": one.opaque.hex()})
    blobs = {} if native.weights is None else {"weights": native.weights}
    return Entry({"constants": constants}, {**blobs, "code": native.code}, dict(native.digests))


def _from_entry(entry: Entry) -> NativeCode:
    constants = [
        Constant(
            **{
                **fields,
                "shape": tuple(fields["shape"]),
                "stride": tuple(fields["stride"]),
                "opaque": bytes.fromhex(fields["opaque"]),
            }
        )
        for fields in entry.fields["constants"]
    ]
    return NativeCode(
        entry.blobs["code"], entry.blobs.get("weights"), constants, dict(entry.digests)
    )


def _versions(program: torch.export.ExportedProgram) -> list[int]:
    """What counts changes of the weights, as far as PyTorch counts them."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return [
        one._version for one in tensors if isinstance(one, torch.Tensor) and not one.is_inference()
    ]
