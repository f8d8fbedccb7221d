"""Builds the parts of the suite that are in C++."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harness.options import REPOSITORY, Options


def build_native(options: Options) -> Path:
    """The folder with the built programs and libraries; compiles what changed.

    Raises:
        RuntimeError: cmake, ninja or the compiler is missing, or failed; the text is theirs.
    """
    import torch.utils

    folder = options.workdir / "cpp"
    beside_python = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=beside_python) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=beside_python) or shutil.which("ninja")
    if cmake is None or ninja is None:
        raise RuntimeError("cmake and ninja are needed; install them with: pip install cmake ninja")
    _run(
        cmake,
        *("-S", str(REPOSITORY / "benchmarks" / "cpp"), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    )
    _run(cmake, "--build", str(folder))
    return folder


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
