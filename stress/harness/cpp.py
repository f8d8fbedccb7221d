"""Builds what scenarios need in C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import neuron_ext
from stress.harness.options import REPOSITORY


def build(folder: Path, target: str) -> Path:
    """The folder with the built ``target`` of ``stress/cpp``, in ``folder``.

    Raises:
        RuntimeError: it does not build; the text is what the tools said.
    """
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(name, path=search) for name in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        raise RuntimeError("cmake and ninja build the C++ program; `make setup` installs them")
    prefixes = f"{neuron_ext.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    build_folder = folder / "cpp"
    configure = [cmake, "-S", REPOSITORY / "stress" / "cpp", "-B", build_folder, "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_PREFIX_PATH={prefixes}"]
    for command in (configure, [cmake, "--build", build_folder, "--target", target]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{target} of stress/cpp does not build: {done.stdout}{done.stderr}")
    return build_folder
