"""Stands in for ``triton_python_backend_utils`` and ``tensorrt_llm`` where a test is only about what our model files
read and emit. What the server makes of it is tested against the real tritonserver in test_serve.py; the real
TensorRT-LLM is not tested at all."""

from __future__ import annotations

import importlib
import json
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

FILES = (
    "model",
    "helpers",
    "engine_process",
    "instance_gpus",
    "open_request",
    "metrics",
    "senders",
    "llm_outputs",
)


class TritonModelException(Exception):
    pass


class TritonError:
    UNKNOWN, INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = range(5)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self.message, self.code = message, code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.array for tensor in output_tensors or []}
        self.error = error

    def has_error(self) -> bool:
        return self.error is not None

    @property
    def text(self) -> str:
        return self.outputs["text_output"][0].decode()


class Sender:
    def __init__(self) -> None:
        self.sent: queue.Queue[tuple[InferenceResponse | None, int]] = queue.Queue()
        self.cancelled = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        self.sent.put((response, flags))

    def is_cancelled(self) -> bool:
        return self.cancelled

    def collect(self) -> list[InferenceResponse]:
        """Everything up to the final flag."""
        responses = []
        while True:
            response, flags = self.sent.get(timeout=10)
            if response is not None:
                responses.append(response)
            if flags:
                return responses


class Request:
    def __init__(
        self,
        *,
        request_id: str = "",
        parameters: dict[str, Any] | None = None,
        timeout_us: int = 0,
        **inputs: Any,
    ) -> None:
        self.inputs = {name: Tensor(name, _array(value)) for name, value in inputs.items()}
        self.sender = Sender()
        self._id, self._parameters, self._timeout_us = request_id, parameters or {}, timeout_us

    def get_response_sender(self) -> Sender:
        return self.sender

    def request_id(self) -> str:
        return self._id

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def timeout(self) -> int:
        return self._timeout_us


class Metric:
    """Holds what it was told; ``value`` of a histogram is the list of its observations."""

    def __init__(self, labels: dict[str, str], histogram: bool) -> None:
        self.labels = labels
        self.value: Any = [] if histogram else 0.0

    def increment(self, amount: float) -> None:
        if amount < 0:
            raise TritonModelException("a counter cannot go down")
        self.value += amount

    def set(self, amount: float) -> None:
        self.value = amount

    def observe(self, amount: float) -> None:
        self.value.append(amount)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)
    made: ClassVar[dict[str, MetricFamily]] = {}
    """By name, the last one of each."""

    def __init__(self, name: str, description: str, kind: int) -> None:
        self.name, self.kind, self.metrics = name, kind, dict[tuple[tuple[str, str], ...], Metric]()
        MetricFamily.made[name] = self

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:
        if (buckets is not None) != (self.kind == MetricFamily.HISTOGRAM):
            raise TritonModelException("buckets belong to histograms")
        return self.metrics.setdefault(
            tuple(labels.items()), Metric(labels, self.kind == MetricFamily.HISTOGRAM)
        )


def _array(value: Any) -> np.ndarray:
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], str | bytes):
        return np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=np.object_)
    return np.array(values)


def make_backend_utils(model_dir: Path) -> ModuleType:
    module = ModuleType("triton_python_backend_utils")
    quiet = SimpleNamespace(log_error=print, log_warn=print, log_info=print)
    module.__dict__.update(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        TritonModelException=TritonModelException,
        TritonError=TritonError,
        Tensor=Tensor,
        InferenceResponse=InferenceResponse,
        MetricFamily=MetricFamily,
        Logger=quiet,
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
        get_model_dir=lambda: str(model_dir),
    )
    return module


@contextmanager
def rendered_model(version_dir: Path, **modules: ModuleType) -> Iterator[Any]:
    """The module ``model`` of a rendered repository, imported as the stub does; ``modules`` are put beside it."""
    added = {"triton_python_backend_utils": make_backend_utils(version_dir), **modules}
    before = {name: sys.modules.pop(name) for name in (*added, *FILES) if name in sys.modules}
    sys.modules.update(added)
    sys.path.insert(0, str(version_dir))
    try:
        yield importlib.import_module("model")
    finally:
        sys.path.remove(str(version_dir))
        for name in (*added, *FILES):
            sys.modules.pop(name, None)
        sys.modules.update(before)
