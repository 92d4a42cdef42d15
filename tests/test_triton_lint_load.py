"""`toolchain triton lint --load`: what it says of models that the real tritonserver loads, refuses, or dies of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.model_repositories import IO, MODEL_PY, PYTHON, ensemble, python_model, step, write_model
from toolchain.cli.main import cli
from toolchain.triton.install import find_server

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`"),
]
STREAMS = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("b", np.zeros(4, np.float32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
RAISES = "\n    def initialize(self, args):\n        raise ValueError('no weights')\n"


def lint(directory: Path, *options: str) -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(cli, ["triton", "lint", str(directory), "--json", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, json.loads(result.stdout)


def test_each_model_by_itself(tmp_path: Path) -> None:
    python_model(tmp_path, "good")
    python_model(tmp_path, "free", files={"config.pbtxt": PYTHON + IO.replace("[ 4 ]", "[ -1 ]", 1)})
    python_model(tmp_path, "gpu", "instance_group [ { kind: KIND_GPU } ]")
    python_model(tmp_path, "raises", files={"1/model.py": MODEL_PY + RAISES})
    python_model(
        tmp_path, "fails", files={"1/model.py": MODEL_PY.replace("out =", "raise OSError('bad')  #")}
    )
    python_model(tmp_path, "known_fault", "max_batch_size: -1")
    python_model(tmp_path, "stream", "model_transaction_policy { decoupled: true }", {"1/model.py": STREAMS})
    write_model(tmp_path, "onnx", f'backend: "onnxruntime"\n{IO}', {"1/model.onnx": "x"})
    write_model(tmp_path, "chain", ensemble(step("good", {"a": "IN"}, {"b": "OUT"})))
    code, value = lint(tmp_path, "--load")
    assert code == 1
    outcomes = {item["model"]: (item["state"], item["said"]) for item in value["loaded"]}  # type: ignore[attr-defined]
    assert {name: state for name, (state, _) in outcomes.items()} == {
        "good": "answered",
        "chain": "answered",
        "stream": "answered",
        "free": "not checked",
        "gpu": "not checked",
        "onnx": "not checked",
        "raises": "refused",
        "fails": "loaded",
    }
    assert outcomes["onnx"][1] == "this server has no backend onnxruntime"
    assert "ValueError: no weights" in outcomes["raises"][1] and "bad" in outcomes["fails"][1]
    errors = [item["where"] for item in value["findings"] if item["severity"] == "error"]  # type: ignore[attr-defined]
    assert errors == ["known_fault/config.pbtxt:4:1", "raises"]


def test_one_sound_model_given_by_its_directory(tmp_path: Path) -> None:
    model = python_model(tmp_path / "repository", "m")
    before = sorted(tmp_path.rglob("*"))
    code, value = lint(model, "--load")
    assert code == 0 and value["findings"] == []
    assert value["loaded"] == [{"model": "m", "state": "answered", "said": "zeros in 1 inputs"}]
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before
