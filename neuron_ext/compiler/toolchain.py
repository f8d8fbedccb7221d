"""What this machine offers to a compiler: a C++ compiler that works, binutils, CPU features."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from neuron_ext.compiler.scratch import scratch_folder

# Instruction sets that a compiler emits by itself for -march=native, or that the packed weights of
# oneDNN depend on, spelled as in the "flags" line of /proc/cpuinfo.
_X86_FEATURES = """
    pni ssse3 sse4_1 sse4_2 sse4a popcnt abm movbe adx avx avx2 fma fma4 xop tbm f16c bmi1 bmi2
    aes pclmulqdq sha_ni vaes vpclmulqdq gfni
    avx512f avx512dq avx512cd avx512bw avx512vl avx512er avx512pf avx512ifma avx512vbmi avx512_vbmi2
    avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_bf16 avx512_fp16
    avx512_vp2intersect avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 avx_ne_convert avx10
    amx_tile amx_int8 amx_bf16 amx_fp16 amx_complex
"""
# The same for the "Features" line of aarch64.
_ARM_FEATURES = """
    fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm jscvt fcma lrcpc sha3 sha512
    asimddp asimdfhm uscat ilrcpc flagm frint flagm2 i8mm bf16 sve sve2 svei8mm svebf16 svef32mm
    svef64mm sveaes svepmull svebitperm svesha3 sve2p1 sme sme2 rng dgh
"""

_TRIVIAL_SOURCE = """
#include <atomic>
#include <vector>
#include <omp.h>
extern "C" int neuron_ext_probe(int n) {
  std::vector<int> values(static_cast<std::size_t>(n), omp_get_max_threads());
  std::atomic<int> sum{0};
  for (int value : values) sum += value;
  return sum;
}
"""
_PROBE_TIMEOUT_SECONDS = 60
_MAX_MESSAGE = 2000

_working: set[tuple[str, int]] = set()
_working_lock = threading.Lock()


def cpp_compiler_problem() -> str | None:
    """Say why code cannot be compiled here, or None where TorchInductor's C++ compiler works.

    The compiler is the one that TorchInductor would run (``CXX`` in the environment, else ``g++``);
    it has to compile a small shared library with OpenMP. A success is remembered for the process, a
    failure is looked at again. Safe from any thread.
    """
    wanted = wanted_compiler()
    path = shutil.which(wanted)
    if path is None:
        return f"the C++ compiler {wanted!r} was not found in PATH"
    key = (path, Path(path).stat().st_mtime_ns)
    with _working_lock:
        if key in _working:
            return None
        problem = _try_compiler(path)
        if problem is None:
            _working.add(key)
    return problem


def wanted_compiler() -> str:
    """The C++ compiler that TorchInductor would run: a name to look for in ``PATH``, or a path."""
    from torch._inductor import config  # slow to import, and needed by few

    search: Any = config.cpp.cxx
    candidates = [
        name for name in (search if isinstance(search, (list, tuple)) else [search]) if name
    ]
    for name in candidates:
        if shutil.which(name):
            return str(name)
    return str(candidates[0]) if candidates else "g++"


def _try_compiler(path: str) -> str | None:
    with scratch_folder("probe") as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_TRIVIAL_SOURCE)
        command = [
            path,
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fopenmp",
            str(source),
            "-o",
            str(Path(folder, "probe.so")),
        ]
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PROBE_TIMEOUT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return f"the C++ compiler {path!r} could not be run: {error}"
    if result.returncode != 0:
        said = tail(result.stderr or result.stdout) or "nothing"
        return (
            f"the C++ compiler {path!r} cannot compile a small program with OpenMP; it said: {said}"
        )
    return None


def identity(tool: str) -> list[Any] | None:
    """What tells a program in ``PATH`` from another version of it, without running it: its path,
    the file behind that, its size and its time in nanoseconds. None where there is none.
    """
    found = shutil.which(tool)
    if found is None:
        return None
    real = Path(found).resolve()
    try:
        status = real.stat()
    except OSError:
        return None
    return [found, str(real), status.st_size, status.st_mtime_ns]


def tail(text: str, limit: int = _MAX_MESSAGE) -> str:
    """The end of a message of a tool: at most ``limit`` characters, marked when something was cut
    off.
    """
    text = text.strip()
    return text if len(text) <= limit else "... " + text[-limit:]


def head(text: str, limit: int = _MAX_MESSAGE) -> str:
    """The beginning of a message: at most ``limit`` characters, marked when cut off."""
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + " ..."


def strip_library(library: Path) -> None:
    """Drop what loading a shared library does not need, in place, where binutils are installed.

    The dynamic symbols stay. Where neither ``strip`` nor ``objcopy`` works, the file stays as it
    is.
    """
    stripped = library.with_suffix(".stripped")
    for command in (
        ["strip", "--strip-unneeded", "-o", str(stripped), str(library)],
        ["objcopy", "--strip-unneeded", str(library), str(stripped)],
    ):
        if shutil.which(command[0]) is None:
            continue
        try:
            result = subprocess.run(
                command, capture_output=True, timeout=_PROBE_TIMEOUT_SECONDS, check=False
            )
        except (OSError, subprocess.SubprocessError):
            continue
        if result.returncode == 0 and stripped.is_file():
            stripped.replace(library)
            return
        stripped.unlink(missing_ok=True)


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """The CPU features that natively compiled code may use, sorted, spelled as in
    ``/proc/cpuinfo``.

    Empty where the kernel does not tell.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ()
    label, known = (
        ("Features", _ARM_FEATURES) if platform.machine() == "aarch64" else ("flags", _X86_FEATURES)
    )
    # Only what every CPU has: the kinds of core of a big.LITTLE machine differ.
    common: set[str] | None = None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == label:
            common = set(value.split()) if common is None else common & set(value.split())
    return tuple(sorted((common or set()) & set(known.split())))
