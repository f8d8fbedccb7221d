"""bfloat16: what it gains, what it costs in accuracy, and against OpenVINO's default."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.harness.measure import rows_of
from benchmarks.harness.options import Options, Question
from benchmarks.harness.table import Table
from benchmarks.models import SMALL_CONVOLUTIONS
from benchmarks.subjects.fleet import Fleet, openvino, ours

FLOAT32, BFLOAT16 = "neuron_ext, float32", "neuron_ext, --auto-cast matmult"
OPENVINO = "OpenVINO, its default"
OPENVINO_BFLOAT16 = "OpenVINO, bfloat16"


def bfloat16(options: Options, model: str) -> list[Table]:
    """2 replicas and 2 callers each; OpenVINO with 2 streams."""
    if not options.takes(model):
        return []
    starts = {
        FLOAT32: ours(model, options, replicas=2, threads=2),
        BFLOAT16: ours(model, options, 2, 2, compiler_args="--auto-cast matmult"),
        OPENVINO: openvino(model, options, precision=""),
    }
    with Fleet(starts, precision="bfloat16") as fleet:
        values = fleet.throughputs(options)
        notes = fleet.notes()
        precision = fleet.workers[OPENVINO].call("precision")
    notes.append(f"OpenVINO's default computes in {precision} here.")
    able = has_bfloat16()
    if not able:
        notes.append("This CPU has no bfloat16 instructions: there is nothing to reach.")
    gain = Table(
        question=f"bfloat16.{model}",
        title=f"{model}: throughput in bfloat16 on 2 cores, against float32",
        unit="calls/s",
        better="higher",
        reference=FLOAT32,
        subject=BFLOAT16,
        rows=rows_of(values, reference=FLOAT32),
        must=1.6 if able else None,
        aim=2.0 if able else None,
        notes=notes,
    )
    against = Table(
        question=f"bfloat16.{model}.openvino",
        title=f"{model}: throughput in bfloat16 on 2 cores, against OpenVINO",
        unit="calls/s",
        better="higher",
        reference=OPENVINO,
        subject=BFLOAT16,
        rows=rows_of(values, reference=OPENVINO),
        must=1.0 if able and precision == "bf16" else None,
        aim=1.1 if able and precision == "bf16" else None,
        notes=notes,
    )
    return [gain, against]


def calls(options: Options) -> list[Table]:
    """What a convolution in bfloat16 costs besides its arithmetic, which bounds ResNet-50."""
    model = "small_convolutions"
    if not options.takes(model):
        return []
    starts = {
        BFLOAT16: ours(model, options, 2, 2, compiler_args="--auto-cast matmult"),
        OPENVINO_BFLOAT16: openvino(model, options, precision="bf16"),
    }
    with Fleet(starts, precision="bfloat16") as fleet:
        rates = fleet.throughputs(options)
        notes = fleet.notes()
    microseconds = 2e6 / SMALL_CONVOLUTIONS  # of two CPUs
    values = {name: [microseconds / rate for rate in own] for name, own in rates.items()}
    if not has_bfloat16():
        notes.append("This CPU has no bfloat16 instructions: oneDNN makes do with others.")
    return [
        Table(
            question="bfloat16.calls",
            title="a convolution of 2x2 pixels and 32 channels in bfloat16, time of one CPU",
            unit="us",
            better="lower",
            reference=OPENVINO_BFLOAT16,
            subject=BFLOAT16,
            rows=rows_of(values, reference=OPENVINO_BFLOAT16, compare="difference"),
            compare="difference",
            notes=[
                *notes,
                f"A model of {SMALL_CONVOLUTIONS} of them, on 2 cores; "
                "its call is part of the time. "
                "Both have oneDNN's convolutions with the additions and activations in them. "
                "OpenVINO keeps oneDNN's primitives from call to call; the convolutions that "
                "code of AOTInductor can call in PyTorch describe them anew each time.",
                "ResNet-50 has 53 convolutions, each of which costs this besides its arithmetic.",
            ],
        )
    ]


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16, by what the kernel says of it."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return bool(words & {"avx512_bf16", "amx_bf16"})


QUESTIONS: dict[str, Question] = {
    **{f"bfloat16.{name}": partial(bfloat16, model=name) for name in ("mlp", "resnet50", "bert")},
    "bfloat16.calls": calls,
}
