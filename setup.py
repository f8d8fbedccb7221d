"""Builds libneuron_ext.so with CMake; installs it, headers and CMake config into the package.

torch is not a build requirement, on purpose. The library must be compiled against the very torch
it will run with. As a build requirement pip would fetch another one into an isolated environment
(as a rule the CUDA build, several GB), and the result may fail at import with undefined symbols.
So install torch first, then build against it:

    python -m pip install --no-build-isolation .

CMake and ninja come from the environment of this Python, else from PATH. The objects stay in
build/cmake, so the next build compiles only what changed. MAX_JOBS limits how many compilers run
at once; CMAKE_ARGS is passed on to CMake.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build" / "cmake"


def torch_cmake_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "neuron_ext is built against the installed torch, and this Python has none. "
            "Install torch first, then: python -m pip install --no-build-isolation ."
        )
    return Path(spec.submodule_search_locations[0]) / "share" / "cmake" / "Torch"


def find_tool(name: str) -> str:
    beside_python = str(Path(sys.executable).parent)
    tool = shutil.which(name, path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if tool is None:
        sys.exit(f"{name} not found. Install it with: python -m pip install {name}")
    return tool


def run_tool(*command: str | Path) -> None:
    # No traceback: it would bury what the compiler said.
    if subprocess.run(command).returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, command[:3]))}")


def job_count() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


class CMakeBuild(build_ext):
    """Runs CMake in place of compiling the extension that setup() names."""

    def run(self) -> None:
        prefix = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "neuron_ext"
        cmake = find_tool("cmake")
        self._configure(cmake)
        jobs = ["--parallel", str(job_count())]
        run_tool(cmake, "--build", BUILD_DIR, "--target", "neuron_ext", *jobs)
        run_tool(cmake, "--install", BUILD_DIR, "--prefix", prefix)

    def _configure(self, cmake: str) -> None:
        torch_dir = torch_cmake_dir()
        command: list[str | Path] = [
            cmake,
            *("-S", ROOT, "-B", BUILD_DIR, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DTorch_DIR={torch_dir}",
            # An editable install has no torch beside it: the library is told where torch is.
            f"-DNEURON_EXT_TORCH_RPATH={torch_dir.parents[2] / 'lib' if self.inplace else ''}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # What CMake found in another torch, or in a copy of this folder, must not be mixed in.
        cache = BUILD_DIR / "CMakeCache.txt"
        if cache.exists():
            known = cache.read_text()
            if f"={torch_dir}\n" not in known or f"={ROOT}\n" not in known:
                command.append("--fresh")
        run_tool(*command)

    # setuptools asks for the compiled modules. There are none: CMake puts a plain library, headers
    # and its config into the package folder, and the wheel takes that folder as it is.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # Stands for the library; it makes the wheel a platform wheel.
    ext_modules=[Extension("neuron_ext.libneuron_ext", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
