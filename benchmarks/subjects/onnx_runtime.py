"""ONNX Runtime."""

from __future__ import annotations

from typing import Any

import onnxruntime

from benchmarks.harness import load
from benchmarks.subjects.subject import Subject, pin


class OnnxRuntime(Subject):
    """``threads`` sessions with one caller each, or one session with ``intra_op`` threads."""

    def __init__(self, file: str, data: str, threads: int, intra_op: int) -> None:
        super().__init__(data, threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._pins = intra_op == 1
        self._sessions = [
            onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            for _ in range(threads)
        ]
        names = [argument.name for argument in self._sessions[0].get_inputs()]
        self._feed = dict(zip(names, self.inputs, strict=True))

    def call_on(self, thread: int) -> load.Call:
        if self._pins:
            pin(thread)
        session, feed = self._sessions[thread], self._feed
        return lambda: session.run(None, feed)

    def answer(self) -> Any:
        return self._sessions[0].run(None, self._feed)[0]
