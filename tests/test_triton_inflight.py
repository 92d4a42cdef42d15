"""The inflight_batcher_llm repository of a TensorRT engine: as published, wired without a loose end, and loaded by the
real tritonserver, with stand-ins where NVIDIA's container has what this machine has not: the TensorRT-LLM backend (one
that repeats the prompt) and transformers (a tokenizer of bytes)."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from google.protobuf import text_format
from tritonclient import grpc
from tritonclient.grpc import model_config_pb2 as pb

from tests.fake_triton import Request, rendered_model
from toolchain.core.errors import FindingsError, ToolchainError, UsageError
from toolchain.serve.run import Ports, serve_engine
from toolchain.triton.engine_dir import read_engine_dir
from toolchain.triton.freshness import refuse_stale_repository
from toolchain.triton.install import find_server
from toolchain.triton.lint import lint_repository
from toolchain.triton.render import refuse_foreign_repository, render_repository
from toolchain.triton.server import TritonServer

GOLDEN = Path(__file__).parent / "golden" / "inflight"
MODELS = ("ensemble", "preprocessing", "tensorrt_llm", "postprocessing")
TOKENIZER = """
class AutoTokenizer:
    eos_token_id, pad_token_id = 0, None

    @classmethod
    def from_pretrained(cls, path, trust_remote_code):
        assert trust_remote_code is False
        return cls()

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i or not skip_special_tokens).decode(errors="replace")
"""
BACKEND = """
import numpy as np
import triton_python_backend_utils as pb_utils


def tensor(request, name):
    found = pb_utils.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy()


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            ids, length = tensor(request, "input_ids"), int(tensor(request, "input_lengths").reshape(-1)[0])
            wanted = int(tensor(request, "request_output_len").reshape(-1)[0])
            assert tensor(request, "stop_words_list").shape[:2] == (1, 2), "stop_words_list"
            answer = ids.reshape(-1)[:length][:wanted]
            streaming = tensor(request, "streaming")
            parts = [answer] if streaming is None or not streaming.reshape(-1)[0] else answer.reshape(-1, 1)
            for part in parts:
                outputs = {
                    "output_ids": part.reshape(1, 1, -1).astype(np.int32),
                    "sequence_length": np.array([[part.size]], dtype=np.int32),
                }
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor(k, v) for k, v in outputs.items()]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def write_engine(directory: Path, *, built: str = "", sliding_window: int | None = None) -> Path:
    """A bundle of target tensorrt; ``built``: the release that its engine says it was built by."""
    (directory / "checkpoint").mkdir(parents=True)
    (directory / "checkpoint" / "config.json").write_text(json.dumps({"sliding_window": sliding_window}))
    manifest = {
        "name": directory.name, "target": "tensorrt", "checkpoint": "checkpoint", "target_version": "1.1.0",
        "limits": {"max_batch_size": 8, "max_seq_len": 512},
    }  # fmt: skip
    (directory / "engine.json").write_text(json.dumps(manifest))
    command = ["trtllm-build", "--use_paged_context_fmha", "enable"]
    (directory / "trtllm_build.json").write_text(json.dumps({"command": command}))
    lock = {"tensorrt_llm": "1.1.0", "image": "i:1.1.0", "gpu": "h100", "sm": 90, "world_size": 1}
    (directory / "versions.lock.json").write_text(json.dumps(lock))
    if built:
        (directory / "engine").mkdir()
        config = {"version": built, "pretrained_config": {"mapping": {"world_size": 1}}}
        (directory / "engine" / "config.json").write_text(json.dumps(config))
        (directory / "engine" / "rank0.engine").write_bytes(b"")
    return directory


def parse(repository: Path, model: str) -> Any:
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), pb.ModelConfig())


def test_rendered_repository_is_the_golden_one(tmp_path: Path) -> None:
    """WRITE_GOLDENS=1 writes them anew."""
    engine = write_engine(tmp_path / "e", built="1.1.0")
    repository = render_repository(engine, tmp_path / "r", served_engine_dir=Path("/engines/e"))
    assert lint_repository(repository, check_paths=False) == []
    assert sorted(path.name for path in repository.iterdir()) == sorted(MODELS)
    for model in MODELS:
        text = (repository / model / "config.pbtxt").read_text()
        assert "${" not in text
        golden = GOLDEN / f"{model}.pbtxt"
        if os.environ.get("WRITE_GOLDENS"):
            golden.parent.mkdir(exist_ok=True)
            golden.write_text(text)
        assert text == golden.read_text(), model
    for source in repository.rglob("*.py"):
        ast.parse(source.read_text())
        assert "${" not in source.read_text()


def test_names_and_types_are_the_published_ones(tmp_path: Path) -> None:
    """From TensorRT-LLM's own config.pbtxt files, written down by hand."""
    repository = render_repository(write_engine(tmp_path / "e", built="1.1.0"), tmp_path / "r")
    published = {
        "ensemble": {
            "text_input": ("STRING", [1]), "max_tokens": ("INT32", [1]), "stop_words": ("STRING", [-1]),
            "top_k": ("INT32", [1]), "temperature": ("FP32", [1]), "seed": ("UINT64", [1]), "stream": ("BOOL", [1]),
            "text_output": ("STRING", [-1]), "cum_log_probs": ("FP32", [-1]), "output_log_probs": ("FP32", [-1, -1]),
        },
        "preprocessing": {
            "QUERY": ("STRING", [1]), "REQUEST_INPUT_LEN": ("INT32", [1]), "INPUT_ID": ("INT32", [-1]),
            "STOP_WORDS_IDS": ("INT32", [2, -1]), "OUT_END_ID": ("INT32", [1]),
        },
        "tensorrt_llm": {
            "input_ids": ("INT32", [-1]), "stop_words_list": ("INT32", [2, -1]), "runtime_top_p": ("FP32", [1]),
            "len_penalty": ("FP32", [1]), "output_ids": ("INT32", [-1, -1]), "sequence_length": ("INT32", [-1]),
        },
        "postprocessing": {
            "TOKENS_BATCH": ("INT32", [-1, -1]), "SEQUENCE_LENGTH": ("INT32", [-1]), "OUTPUT": ("STRING", [-1]),
        },
    }  # fmt: skip
    for model, expected in published.items():
        config = parse(repository, model)
        found = {
            item.name: (pb.DataType.Name(item.data_type).removeprefix("TYPE_"), list(item.dims))
            for item in (*config.input, *config.output)
        }
        assert {name: found.get(name) for name in expected} == expected, model
    backend = parse(repository, "tensorrt_llm")
    assert (backend.backend, backend.max_batch_size) == ("tensorrtllm", 8)
    assert backend.model_transaction_policy.decoupled
    reshaped = {item.name for item in backend.input if item.HasField("reshape")}
    assert {"input_lengths", "request_output_len", "temperature"} <= reshaped and "input_ids" not in reshaped


def test_parameters_follow_the_engine(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", sliding_window=4096)
    repository = render_repository(engine, tmp_path / "r", gpu_device_ids="2")
    parameters = {
        key: item.string_value for key, item in parse(repository, "tensorrt_llm").parameters.items()
    }
    assert parameters["gpt_model_path"] == str(engine / "engine")
    assert parameters["max_attention_window_size"] == "4096" and parameters["gpu_device_ids"] == "2"
    assert parameters["enable_kv_cache_reuse"] == parameters["enable_chunked_context"] == "true"
    findings = lint_repository(repository)
    assert [(item.code, item.severity) for item in findings] == [("TC-610", "warning")]
    assert "no engine yet" in findings[0].message


def replace_in(file: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(repository: Path) -> None:
        text = (repository / file).read_text()
        assert old in text
        (repository / file).write_text(text.replace(old, new, 1))

    return plant


ENSEMBLE, TEXT = "ensemble/config.pbtxt", "preprocessing/config.pbtxt"
FAULTS = [
    (replace_in(ENSEMBLE, '"preprocessing"', '"preprocess"'), "TC-604", "no such model beside it"),
    (replace_in(ENSEMBLE, '"input_ids"', '"input_id"'), "TC-602", "no input 'input_id'"),
    (replace_in(ENSEMBLE, 'key: "INPUT_ID"', 'key: "INPUT"'), "TC-602", "no output 'INPUT'"),
    (replace_in(ENSEMBLE, 'value: "max_tokens"', 'value: "maximum"'), "TC-602", "gives 'maximum'"),
    (replace_in(ENSEMBLE, 'key: "input_lengths"', 'key: "end_id"'), "TC-602", "'input_lengths' of tensorrt_llm is not"),
    (replace_in(ENSEMBLE, 'value: "text_output"', 'value: "text"'), "TC-602", "no step gives output 'text_output'"),
    (replace_in("postprocessing/config.pbtxt", "max_batch_size: 8", "max_batch_size: 0"), "TC-602", "shapes differ"),
    (replace_in("tensorrt_llm/config.pbtxt", "gpt_model_path", "gpt_model"), "TC-602", "gpt_model_path is missing"),
    (replace_in(TEXT, "/checkpoint", "/gone"), "TC-610", "does not exist"),
    (replace_in(TEXT, '"true"', '"${add_special_tokens}"'), "TC-603", "unfilled"),
    (lambda repository: (repository / "preprocessing/1/model.py").unlink(), "TC-604", "missing"),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "code", "said"), FAULTS)
def test_planted_faults(tmp_path: Path, plant: Callable[[Path], None], code: str, said: str) -> None:
    repository = render_repository(write_engine(tmp_path / "e", built="1.1.0"), tmp_path / "r")
    plant(repository)
    findings = lint_repository(repository)
    assert any(item.code == code and said in item.message for item in findings), findings


def test_serving_is_refused_until_the_engine_fits_its_lock(tmp_path: Path) -> None:
    """Not built, of another release, and right: then with the command for NVIDIA's container."""
    for built, code, said in (
        ("", "TC-424", "not built yet"),
        ("1.2.1", "TC-423", "built by TensorRT-LLM 1.2.1, the lock says 1.1.0"),
        ("1.1.0", "TC-626", "TensorRT-LLM backend of 1.1.0"),
    ):
        engine = write_engine(tmp_path / f"e{built}", built=built)
        repository = render_repository(engine, tmp_path / f"r{built}")
        with pytest.raises(ToolchainError, match=said) as caught:
            serve_engine(engine, repository, Ports(http=0, grpc=0, metrics=0, status=0), print)
        assert caught.value.code == code
    assert "tritonserver:25.12-trtllm-python-py3" in caught.value.hint
    assert f"--world_size 1 --model_repo {repository}" in caught.value.hint


def test_a_repository_belongs_to_one_engine(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "a", built="1.1.0")
    repository = render_repository(engine, tmp_path / "r")
    refuse_stale_repository(read_engine_dir(engine), repository)
    refuse_foreign_repository(repository, force=False)
    other = write_engine(tmp_path / "b", built="1.1.0")
    with pytest.raises(UsageError, match="was rendered for target tensorrt"):
        refuse_stale_repository(read_engine_dir(other), repository)


def test_two_instances_are_not_for_this_target(tmp_path: Path) -> None:
    with pytest.raises((UsageError, FindingsError)) as caught:
        render_repository(write_engine(tmp_path / "e"), tmp_path / "r", instances=2)
    assert caught.value.code == "TC-608" and not (tmp_path / "r").exists()


def test_word_lists_and_padding(tmp_path: Path) -> None:
    """[prompts, 2, n]: ids of all words, and the index behind each word; the rest is 0 and -1."""
    repository = render_repository(write_engine(tmp_path / "e"), tmp_path / "r")
    version = repository / "preprocessing" / "1"
    (version / "transformers.py").write_text(TOKENIZER)
    import types

    tokenizer = types.ModuleType("transformers")
    exec(TOKENIZER, tokenizer.__dict__)
    with rendered_model(version, transformers=tokenizer) as model:
        made = model.TritonPythonModel()
        parameters = {"tokenizer_dir": {"string_value": "x"}, "add_special_tokens": {"string_value": "true"}}
        made.initialize({"model_config": json.dumps({"parameters": parameters})})
        request = Request(
            QUERY=["hello", "hi"], REQUEST_OUTPUT_LEN=[4, 5], STOP_WORDS_DICT=["ab", "c", "d", ""]
        )
        (answer,) = made.execute([request])
        outputs = answer.outputs
        assert outputs["INPUT_ID"].tolist() == [[104, 101, 108, 108, 111], [104, 105, 0, 0, 0]]
        assert outputs["REQUEST_INPUT_LEN"].tolist() == [[5], [2]]
        assert outputs["STOP_WORDS_IDS"].tolist() == [[[97, 98, 99], [2, 3, -1]], [[100, 0, 0], [1, -1, -1]]]
        assert outputs["BAD_WORDS_IDS"].shape == (2, 2, 0)
        (refused,) = made.execute([Request(QUERY=[""], REQUEST_OUTPUT_LEN=[4])])
        assert refused.has_error() and "no tokens" in refused.error.message


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The real tritonserver on the rendered repository, with the stand-ins."""
    root = tmp_path_factory.mktemp("inflight")
    repository = render_repository(write_engine(root / "e", built="1.1.0"), root / "r")
    for name in ("preprocessing", "postprocessing"):
        (repository / name / "1" / "transformers.py").write_text(TOKENIZER)
    (repository / "tensorrt_llm" / "1" / "model.py").write_text(BACKEND)
    path = repository / "tensorrt_llm" / "config.pbtxt"
    path.write_text(path.read_text().replace('backend: "tensorrtllm"', 'backend: "python"'))
    started = Echo(repository)
    with started:
        yield started


class Echo(TritonServer):
    """Asks the ensemble, which is the model for text here."""

    def probe(self, *, timeout_s: float) -> str:
        return ask(self, "probe", 5)


def ask(server: TritonServer, text: str, tokens: int, **more: Any) -> str:
    body = {"text_input": text, "max_tokens": tokens, **more}
    answer = requests.post(f"{server.http_url}/v2/models/ensemble/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["text_output"]


@pytest.mark.server
@pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`")
def test_the_real_server_loads_the_ensemble_and_answers(server: TritonServer) -> None:
    assert ask(server, "hello world", 5) == "hello"
    assert ask(server, "hello world", 50, stop_words="w", temperature=0.5, top_k=4, seed=7) == "hello world"
    with grpc.InferenceServerClient(server.grpc_url) as client:
        for model in MODELS:
            assert client.is_model_ready(model)


@pytest.mark.server
@pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`")
def test_the_real_server_streams_through_the_ensemble(server: TritonServer) -> None:
    body = {"text_input": "abc", "max_tokens": 3, "stream": True}
    url = f"{server.http_url}/v2/models/ensemble/generate_stream"
    lines = requests.post(url, json=body, timeout=60).text.splitlines()
    texts = [
        json.loads(line.removeprefix("data: "))["text_output"] for line in lines if line.startswith("data:")
    ]
    assert [text for text in texts if text] == ["a", "b", "c"]


@pytest.mark.server
@pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`")
def test_a_batch_of_prompts_in_one_request(server: TritonServer) -> None:
    """Preprocessing alone: the ensemble's batch dimension reaches it."""
    with grpc.InferenceServerClient(server.grpc_url) as client:
        query = grpc.InferInput("QUERY", [2, 1], "BYTES")
        query.set_data_from_numpy(np.array([[b"hello"], [b"hi"]], dtype=np.object_))
        length = grpc.InferInput("REQUEST_OUTPUT_LEN", [2, 1], "INT32")
        length.set_data_from_numpy(np.array([[4], [5]], dtype=np.int32))
        answer = client.infer("preprocessing", [query, length])
        assert answer.as_numpy("REQUEST_INPUT_LEN").tolist() == [[5], [2]]
        assert answer.as_numpy("INPUT_ID").shape == (2, 5)
