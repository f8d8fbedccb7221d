"""What matrix products alone can do, which bounds the models that are made of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness.measure import in_new_process, rounds_of, rows_of
from benchmarks.harness.options import Options, Question
from benchmarks.harness.table import Table

OURS = "neuron_ext"
ONEDNN = "oneDNN, packed"
MKL = "MKL, packed"
PLAIN = "MKL, not packed"
READ = "the weights read once"
# How many products of (rows, inputs, outputs) there are in a model.
PRODUCTS = {
    "mlp": [(8, 16, 1024, 1024)],
    "bert": [(48, 128, 768, 768), (12, 128, 768, 3072), (12, 128, 3072, 768)],
}


def kernels(options: Options, model: str) -> list[Table]:
    """The products of a model on one CPU, by those libraries that PyTorch has."""
    if not options.takes(model):
        return []
    values = in_new_process(
        f"{__name__}:time_products",
        environment={"OMP_NUM_THREADS": "1"},
        model=model,
        rounds=max(options.rounds, 5),
    )
    layers = ", ".join(f"{n} of {m} x {k} x {outputs}" for n, m, k, outputs in PRODUCTS[model])
    return [
        Table(
            question=f"kernels.{model}",
            title=f"{model}: its matrix products alone, on one CPU",
            unit="ms",
            better="lower",
            reference=ONEDNN,
            subject=OURS,
            rows=rows_of(values, reference=ONEDNN),
            notes=[
                f"Products in float32, with weights of their own: {layers}.",
                "A compiled subgraph has products of our own where rows are few, and oneDNN's "
                "elsewhere. What MKL packs is bound to the address "
                "that it was packed at, and cannot be saved: TorchInductor has it for code that "
                "stays in the process, not for code compiled ahead of time, and says so in "
                "torch/_inductor/fx_passes/mkldnn_fusion.py.",
                f"{READ!r} adds them up: any product has to read them too.",
            ],
        )
    ]


# ------------------------------------------------------------------------ in processes of their own


def time_products(model: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds for all products of a model, one value a round. One thread."""
    torch.set_num_threads(1)
    inputs, weights, biases = [], [], []
    for count, rows, width, outputs in PRODUCTS[model]:
        for _ in range(count):
            inputs.append(torch.randn(rows, width))
            weights.append(torch.randn(outputs, width) / width**0.5)
            biases.append(torch.randn(outputs))
    batches = [len(x) for x in inputs]
    onednn = list(map(torch.ops.mkldnn._reorder_linear_weight, weights, batches))
    mkl = list(map(torch.ops.mkl._mkl_reorder_linear_weight, weights, batches))

    def with_onednn(n: int) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs[n], onednn[n], biases[n], "none", [], "")

    def with_mkl(n: int) -> torch.Tensor:
        return torch.ops.mkl._mkl_linear(inputs[n], mkl[n], weights[n], biases[n], batches[n])

    compiled = _compiled(inputs, weights, biases)
    subjects: dict[str, Callable[[int], torch.Tensor]] = {
        ONEDNN: with_onednn,
        MKL: with_mkl,
        PLAIN: lambda n: torch.nn.functional.linear(inputs[n], weights[n], biases[n]),
    }

    def milliseconds(product: Callable[[int], torch.Tensor]) -> float:
        begin = time.perf_counter()
        for n in range(len(inputs)):
            product(n)
        return 1e3 * (time.perf_counter() - begin)

    def milliseconds_compiled() -> float:
        begin = time.perf_counter()
        compiled(*inputs)
        return 1e3 * (time.perf_counter() - begin)

    with torch.inference_mode():
        for n, ours in enumerate(compiled(*inputs)):
            plain = subjects[PLAIN](n)
            for found in (ours, with_onednn(n), with_mkl(n)):
                torch.testing.assert_close(found, plain, atol=1e-3, rtol=1e-3)
        return rounds_of(
            {
                OURS: milliseconds_compiled,
                **{name: partial(milliseconds, product) for name, product in subjects.items()},
                READ: partial(milliseconds, lambda n: weights[n].sum()),
            },
            rounds,
        )


class _Products(torch.nn.Module):
    """The products, each with an input of its own."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)
        self.biases = torch.nn.ParameterList(biases)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.nn.functional.linear, inputs, self.weights, self.biases))


def _compiled(
    inputs: list[torch.Tensor], weights: list[torch.Tensor], biases: list[torch.Tensor]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    import neuron_ext

    with neuron_ext.neuron_cores_context(start_nc=0, nc_count=1):
        return neuron_ext.trace(_Products(weights, biases).eval(), tuple(inputs))


QUESTIONS: dict[str, Question] = {
    f"kernels.{model}": partial(kernels, model=model) for model in PRODUCTS
}
