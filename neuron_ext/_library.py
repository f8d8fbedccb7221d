"""Loads ``libneuron_ext.so``, which registers the class and the ops with TorchScript."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libneuron_ext.so"


def load_library() -> Any:
    """Loads the library, once in a process, and returns its ops. Takes no core.

    Raises:
        ImportError: the library is missing or does not fit the installed torch.
    """
    if not LIBRARY.exists():
        raise ImportError(
            f"neuron_ext is not built: {LIBRARY} is missing. In a source tree run "
            "'pip install --no-build-isolation -e .'"
        )
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{LIBRARY} does not load with torch {torch.__version__}: {error}. It runs with the "
            "torch that it was built against; build neuron_ext again with the installed torch"
        ) from error
    # Python runs this after non-daemon threads have ended, and before it tears itself down.
    atexit.register(torch.ops.neuron_ext.prepare_exit)
    return torch.ops.neuron_ext


ops = load_library()

__all__ = ["LIBRARY", "PACKAGE", "ops"]
