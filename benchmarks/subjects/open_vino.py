"""OpenVINO."""

from __future__ import annotations

import time
from typing import Any

import openvino

from benchmarks.harness import load
from benchmarks.subjects.subject import Subject


class OpenVino(Subject):
    """Compiled for throughput with one stream per CPU, as its documentation says.

    Throughput is measured with its own queue of asynchronous requests, latency with one request per
    thread. ``precision`` is ``"f32"``, or empty for its default on this CPU.
    """

    def __init__(self, file: str, data: str, threads: int, precision: str) -> None:
        super().__init__(data, threads)
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
        }
        if precision:
            config["INFERENCE_PRECISION_HINT"] = precision
        self._model = openvino.Core().compile_model(file, "CPU", config)
        self._feed = dict(enumerate(self.inputs))

    def precision(self) -> str:
        """The precision it computes in."""
        return str(self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def call_on(self, thread: int) -> load.Call:
        request, feed = self._model.create_infer_request(), self._feed
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)

    def answer(self) -> Any:
        return self._model.create_infer_request().infer(self._feed)[0]

    def throughput(self, seconds: float) -> float:
        completions: list[float] = []
        jobs = self._model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        queue = openvino.AsyncInferQueue(self._model, jobs)
        queue.set_callback(lambda request, _: completions.append(time.perf_counter()))
        for _ in range(jobs):  # each request warms up once
            queue.start_async(self._feed, share_inputs=True)
        queue.wait_all()
        completions.clear()
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(completions) < load.FEWEST:
            queue.start_async(self._feed, share_inputs=True)
        end = time.perf_counter()
        queue.wait_all()
        return load.rate_of([t for t in completions if t < end])
