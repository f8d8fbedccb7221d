"""This package, eager PyTorch, TorchScript and ``aoti_load_package``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import load
from benchmarks.subjects.subject import Subject


class _Torch(Subject):
    """Called in inference mode, which is a setting of each thread."""

    model: Callable[..., torch.Tensor]

    def __init__(self, data: str, threads: int) -> None:
        super().__init__(data, threads)
        self.inputs = [torch.from_numpy(array) for array in self.inputs]

    def call_on(self, thread: int) -> load.Call:
        model, inputs = self.model, self.inputs

        def call() -> Any:
            with torch.inference_mode():
                return model(*inputs)

        return call

    def answer(self) -> Any:
        return self.call_on(0)().float().numpy()


class Ours(_Torch):
    """The saved file, loaded onto ``replicas`` cores from core 0 on."""

    def __init__(self, file: str, data: str, replicas: int, threads: int) -> None:
        import neuron_ext

        super().__init__(data, threads)
        cores = neuron_ext.visible_core_count()
        if cores < replicas:
            raise RuntimeError(f"{replicas} replicas need as many cores; here are {cores}")
        with neuron_ext.neuron_cores_context(0, replicas):
            self.model = torch.jit.load(file)
        neuron_ext.wait(self.model)


class Eager(_Torch):
    def __init__(self, name: str, data: str, threads: int) -> None:
        from benchmarks.models import build

        super().__init__(data, threads)
        self.model, _ = build(name)


class Script(_Torch):
    """``torch.jit``, frozen and optimised for inference."""

    def __init__(self, file: str, data: str, threads: int) -> None:
        super().__init__(data, threads)
        frozen = torch.jit.freeze(torch.jit.load(file).eval())
        self.model = torch.jit.optimize_for_inference(frozen)
        # The first calls compile.
        for _ in range(3):
            self.answer()


class Package(_Torch):
    """``aoti_load_package``. Its call holds the GIL: more threads than one would not help."""

    def __init__(self, file: str, data: str) -> None:
        super().__init__(data, threads=1)
        self.model = torch._inductor.aoti_load_package(file)
