"""What compiled code depends on besides the program: versions, machine, tools and settings.

Looks without running anything: a tool is told by its file, not by asking it for its version.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from neuron_ext._version import __version__
from neuron_ext.compiler import toolchain

# Counts changes of what stands in an entry.
_FORMAT = 1

# Of PyTorch, what writes or is compiled into code. Its other parts go by its version.
_TORCH_SOURCES = ("_decomp", "_functorch", "_inductor", "include/torch/csrc/inductor")
_TOOLS = ("as", "ld", "objcopy", "strip")

_VARIABLE_PREFIXES = (
    "AOT",
    "ATEN_",
    "DNNL_",
    "INDUCTOR_",
    "MKL_",
    "MKLDNN_",
    "ONEDNN_",
    "PYTORCH_",
    "TORCH",
)
# What C++ compilers read, and where TorchInductor looks for OpenMP.
_VARIABLES = (
    "CC",
    "CFLAGS",
    "COMPILER_PATH",
    "CONDA_PREFIX",
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "CPPFLAGS",
    "CXX",
    "CXXFLAGS",
    "C_INCLUDE_PATH",
    "GCC_EXEC_PREFIX",
    "LDFLAGS",
    "LD_RUN_PATH",
    "LIBRARY_PATH",
    "OMP_PREFIX",
)
_VARIABLES_LEFT_OUT = frozenset(
    {"TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "TORCH_LOGS", "TORCH_LOGS_OUT", "TORCH_TRACE"}
)
# Functions that a user hooks into TorchInductor; `save_config_portable` leaves them out.
_HOOKS = (
    "_post_fusion_custom_pass",
    "_pre_fusion_custom_pass",
    "joint_custom_post_pass",
    "joint_custom_pre_pass",
    "post_grad_custom_post_pass",
    "post_grad_custom_pre_pass",
    "pre_grad_custom_pass",
)


class NotKeyableError(Exception):
    """What is to be compiled cannot be told from something else with certainty."""


def plain(value: Any) -> Any:
    """The value in a form that JSON keeps apart from any other value.

    Raises:
        NotKeyableError: for what is not a literal.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        # JSON has no word for these.
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is complex:
        return {"complex": [plain(value.real), plain(value.imag)]}
    if type(value) in (list, tuple) or type(value).__name__ == "immutable_list":
        return {type(value).__name__: [plain(one) for one in value]}
    if type(value) in (set, frozenset) or type(value).__name__ == "OrderedSet":
        return {"set": sorted((plain(one) for one in value), key=json.dumps)}
    if isinstance(value, Mapping):
        pairs = [[plain(key), plain(one)] for key, one in value.items()]
        return {"dict": sorted(pairs, key=json.dumps)}
    if isinstance(value, slice):
        return {"slice": [plain(one) for one in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.device)):
        return {type(value).__name__: str(value)}
    raise NotKeyableError(f"it has a value of type {type(value).__name__}")


def environment(settings: Mapping[str, Any]) -> Any:
    """All of it, as JSON takes it, with ``settings`` in place of TorchInductor's own.

    Raises:
        NotKeyableError: if TorchInductor runs functions of its user, or a setting is no literal.
    """
    try:
        sources = [_own_sources(), _torch_sources()]
    except OSError as error:
        raise NotKeyableError(f"an installed package cannot be read: {error}") from error
    return {
        "format": _FORMAT,
        "versions": [__version__, torch.__version__, torch.version.git_version],
        "sources": sources,
        "python": list(sys.version_info[:3]),
        "machine": [
            platform.machine(),
            os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else "",
            list(toolchain.cpu_features()),
            _cpu_model(),
        ],
        "tools": [toolchain.identity(name) for name in (toolchain.wanted_compiler(), *_TOOLS)],
        "variables": dict(_variables()),
        "settings": _settings(settings),
        "state": _state(),
    }


@functools.cache
def _own_sources() -> str:
    """A digest of the modules that make executables; an edited source tree has no new version."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _torch_sources() -> str:
    """A digest of names, sizes and times: reading the files would take a second."""
    root = Path(torch.__file__).parent
    found = []
    for part in _TORCH_SOURCES:
        for folder, folders, files in os.walk(root / part):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            within = os.path.relpath(folder, root)
            for name in sorted(files):
                status = os.stat(os.path.join(folder, name))
                found.append(f"{within}/{name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(found).encode(errors="surrogateescape")).hexdigest()


@functools.cache
def _cpu_model() -> list[str]:
    """What ``-march=native`` tunes for, and the cache sizes that blocking goes by."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size")
    arm = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return []
    lines = (line.partition(":") for line in text.splitlines())
    return sorted(
        {
            f"{name.strip()}: {value.strip()}"
            for name, _, value in lines
            if name.strip() in wanted + arm
        }
    )


def _variables() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if name in _VARIABLES_LEFT_OUT:
            continue
        if name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES):
            yield name, value


def _settings(settings: Mapping[str, Any]) -> Any:
    # What they have is put into these modules when they are imported.
    inductor_config: Any = importlib.import_module("torch._inductor.config")
    functorch_config: Any = importlib.import_module("torch._functorch.config")
    shape_config: Any = importlib.import_module("torch.fx.experimental._config")
    for name in _HOOKS:
        if getattr(inductor_config, name, None) is not None:
            raise NotKeyableError(f"TorchInductor's setting {name} is a function")
    # A backend of one's own comes with passes of its own.
    common = sys.modules.get("torch._inductor.codegen.common")
    passes = getattr(common, "custom_backend_passes", {})
    if any(value is not None for value in passes.values()):
        raise NotKeyableError("a backend of TorchInductor has passes of its own")
    try:
        inductor = inductor_config.save_config_portable(ignore_private_configs=False)
    except RuntimeError as error:  # a factory without an identity
        raise NotKeyableError(str(error)) from error
    found: dict[str, Any] = {}
    for section, values in (
        ("inductor", {**inductor, **settings}),
        ("functorch", functorch_config.save_config_portable()),
        ("shapes", shape_config.save_config_portable()),
    ):
        for name, value in values.items():
            try:
                found[f"{section}.{name}"] = plain(value)
            except NotKeyableError as error:
                raise NotKeyableError(f"the setting {section}.{name}: {error}") from error
    return found


def _state() -> Any:
    """The switches of the process that lowering and the packing of weights look at."""
    backends: Any = torch.backends
    return plain(
        {
            # oneDNN packs weights for a number of threads.
            "threads": torch.get_num_threads(),
            "default dtype": torch.get_default_dtype(),
            "default device": torch.get_default_device(),
            "deterministic": [
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            ],
            "matmul precision": torch.get_float32_matmul_precision(),
            "mkldnn": [
                backends.mkldnn.is_available(),
                backends.mkldnn.enabled,
                backends.mkldnn.deterministic,
                backends.mkldnn.allow_tf32,
                backends.mkldnn.fp32_precision,
                backends.mkldnn.matmul.fp32_precision,
                backends.mkldnn.conv.fp32_precision,
                backends.mkldnn.rnn.fp32_precision,
            ],
            "fp32 precision": backends.fp32_precision,
            "vectors": backends.cpu.get_cpu_capability(),
            # They choose how attention is taken apart, on the CPU too.
            "attention": [
                backends.cuda.flash_sdp_enabled(),
                backends.cuda.mem_efficient_sdp_enabled(),
                backends.cuda.math_sdp_enabled(),
            ],
        }
    )
