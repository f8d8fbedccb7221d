"""The subjects of one question: their workers, checked, measured by turns, and ended together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType

from benchmarks.artifacts import artifact
from benchmarks.harness.measure import rounds_of
from benchmarks.harness.options import Options
from benchmarks.harness.worker import IDLE_LIMIT, Worker
from benchmarks.models import traced
from benchmarks.native import build_native

Start = Callable[[], Worker]
# Largest error relative to the largest output: another order of additions in float32; bfloat16.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Fleet:
    """Workers by the names of their subjects. Starting checks what each of them answers."""

    def __init__(self, starts: Mapping[str, Start], precision: str = "float32") -> None:
        """Starts all.

        Raises:
            RuntimeError: one cannot start, or its answer is not that of the eager model.
        """
        self.workers: dict[str, Worker] = {}
        self.errors: dict[str, float] = {}
        """The largest relative error of each against the eager model."""
        self._stack = ExitStack()
        try:
            for name, start in starts.items():
                worker = self._stack.enter_context(start())
                self.workers[name] = worker
                error = float(worker.call("error"))
                if not error <= TOLERANCE[precision]:
                    raise RuntimeError(
                        f"{name} answers with a relative error of {error:.2g} against the eager "
                        f"model; allowed is {TOLERANCE[precision]}. Nothing was measured"
                    )
                self.errors[name] = error
        except BaseException:
            self._stack.close()
            raise

    def throughputs(self, options: Options) -> dict[str, list[float]]:
        """Calls per second of each subject, round by round."""
        subjects = {name: self._throughput(name, options.window) for name in self.workers}
        values = rounds_of(subjects, options.rounds)
        self.check_idle()
        return values

    def _throughput(self, name: str, seconds: float) -> Callable[[], float]:
        worker = self.workers[name]
        return lambda: float(worker.call("throughput", seconds=seconds))

    def check_idle(self) -> None:
        """Raises RuntimeError if a waiting worker kept a CPU busy while others were measured."""
        for name, worker in self.workers.items():
            if worker.idle_share > IDLE_LIMIT:
                raise RuntimeError(
                    f"{name} used {worker.idle_share:.0%} of a CPU while it waited, which disturbs "
                    "the others: look for threads that spin"
                )

    def notes(self) -> list[str]:
        """Accuracy and idleness, for a table."""
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        idle = max(worker.idle_share for worker in self.workers.values())
        return [
            f"Largest error against the eager model, relative to its largest output: {errors}.",
            f"Waiting workers used at most {idle:.1%} of a CPU.",
        ]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def ours(
    name: str, options: Options, replicas: int, threads: int, compiler_args: str = ""
) -> Start:
    """This package: ``replicas`` of the saved file, and ``threads`` that call it."""
    return lambda: Worker(
        "benchmarks.subjects.pytorch:Ours",
        file=str(traced(name, options, compiler_args)),
        data=_data(name, options),
        replicas=replicas,
        threads=threads,
    )


def openvino(name: str, options: Options, precision: str = "f32") -> Start:
    """OpenVINO with two streams; an empty precision is its default on this CPU."""
    return lambda: Worker(
        "benchmarks.subjects.open_vino:OpenVino",
        file=str(artifact("openvino", name, options)),
        data=_data(name, options),
        threads=2,
        precision=precision,
    )


def two_callers(name: str, options: Options) -> dict[str, Start]:
    """The peers that answer two callers at a time with one thread each."""
    one = {"OMP_NUM_THREADS": "1"}
    return {
        "torch.jit, 2 callers": lambda: Worker(
            "benchmarks.subjects.pytorch:Script",
            environment=one,
            file=str(artifact("script", name, options)),
            data=_data(name, options),
            threads=2,
        ),
        "AOTInductor C++ runner, 2 models": lambda: Worker(
            "benchmarks.subjects.cpp_runner:CppRunner",
            environment=one,
            program=str(build_native(options) / "package_runner"),
            file=str(artifact("package", name, options)),
            data=_data(name, options),
            threads=2,
        ),
        "ONNX Runtime, 2 sessions": _onnx_runtime(name, options, threads=2, intra_op=1),
        "OpenVINO, 2 streams": openvino(name, options),
    }


def peers(name: str, options: Options) -> dict[str, Start]:
    """All peers on 2 cores, in each of the ways to use them that could be the best."""
    two = {"OMP_NUM_THREADS": "2"}
    return {
        "eager, 2 intra-op threads": _eager(name, options, threads=1, intra_op=2),
        "eager, 2 callers": _eager(name, options, threads=2, intra_op=1),
        "aoti_load_package, 2 intra-op threads": lambda: Worker(
            "benchmarks.subjects.pytorch:Package",
            environment=two,
            file=str(artifact("package_2_threads", name, options)),
            data=_data(name, options),
        ),
        "ONNX Runtime, 2 intra-op threads": _onnx_runtime(name, options, threads=1, intra_op=2),
        **two_callers(name, options),
    }


def _eager(name: str, options: Options, threads: int, intra_op: int) -> Start:
    return lambda: Worker(
        "benchmarks.subjects.pytorch:Eager",
        environment={"OMP_NUM_THREADS": str(intra_op)},
        name=name,
        data=_data(name, options),
        threads=threads,
    )


def _onnx_runtime(name: str, options: Options, threads: int, intra_op: int) -> Start:
    return lambda: Worker(
        "benchmarks.subjects.onnx_runtime:OnnxRuntime",
        file=str(artifact("onnx", name, options)),
        data=_data(name, options),
        threads=threads,
        intra_op=intra_op,
    )


def _data(name: str, options: Options) -> str:
    return str(artifact("data", name, options))
