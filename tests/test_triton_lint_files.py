"""The lint on repositories of any kind: files, versions, backends, layouts by release, and whatever else lies there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine_dirs import write_engine
from tests.model_repositories import IO, MODEL_PY, NULL, PYTHON, ensemble, python_model, step, write_model
from toolchain.core.codes import CODES
from toolchain.core.errors import UsageError
from toolchain.core.findings import Finding, errors
from toolchain.triton.lint import lint_repository, read_and_lint
from toolchain.triton.render import render_repository
from toolchain.triton.rules.places import read_places, words
from toolchain.triton.rules.table import SUBJECTS, markdown

CONFIG = "m/config.pbtxt"
ONNX = 'backend: "onnxruntime"\n'


def said(findings: list[Finding]) -> list[str]:
    return [f"{item.severity} {item}" for item in findings]


SOUND: dict[str, Callable[[Path], object]] = {
    "python": lambda root: python_model(root, "m"),
    "no config.pbtxt": lambda root: write_model(root, "m", None, {"1/model.py": MODEL_PY}),
    "onnx without config.pbtxt": lambda root: write_model(root, "m", None, {"1/model.onnx": "x"}),
    "onnx in a directory": lambda root: write_model(root, "m", ONNX, {"1/model.onnx/model.onnx": "x"}),
    "plan by platform": lambda root: write_model(root, "m", 'platform: "tensorrt_plan"', {"1/model.plan": "x"}),
    "plan by capability": lambda root: write_model(
        root,
        "m",
        'platform: "tensorrt_plan"\ncc_model_filenames { key: "9.0" value: "h100.plan" }',
        {"1/h100.plan": "x"},
    ),
    "torch": lambda root: write_model(root, "m", f'platform: "pytorch_libtorch"\n{IO}', {"1/model.pt": "x"}),
    "saved model": lambda root: write_model(
        root, "m", 'platform: "tensorflow_savedmodel"', {"1/model.savedmodel/saved_model.pb": "x"}
    ),
    "vllm": lambda root: write_model(root, "m", 'backend: "vllm"', {"1/model.json": '{"model": "org/name"}'}),
    "own library": lambda root: write_model(root, "m", NULL + IO, {"libtriton_null.so": "x"}),
    "name.backend": lambda root: write_model(root, "m.identity", None),
    "class from elsewhere": lambda root: write_model(
        root, "m", PYTHON + IO, {"1/model.py": "from impl import *\n", "1/impl.py": MODEL_PY}
    ),
    "other file": lambda root: write_model(
        root, "m", f'{PYTHON}{IO}default_model_filename: "other.py"', {"1/other.py": MODEL_PY}
    ),
    "newest of two": lambda root: python_model(root, "m", files={"2/model.py": MODEL_PY}),
    "hidden files": lambda root: python_model(root, "m", files={".DS_Store": "x", "../.hidden": "x", "../README": "x"}),
    "folders beside": lambda root: python_model(root, "m", files={"data/x": "x", "warmup/x": "x"}),
    "repository agent": lambda root: write_model(
        root, "m", 'model_repository_agents { agents [ { name: "relocate" } ] }'
    ),
    "environment": lambda root: python_model(
        root,
        "m",
        'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "$$TRITON_MODEL_DIRECTORY/e" } }',
        {"e/x": ""},
    ),
    "decoupled": lambda root: python_model(root, "m", "model_transaction_policy { decoupled: true }"),
    "labels": lambda root: write_model(
        root,
        "m",
        PYTHON + IO.replace('name: "b"', 'name: "b" label_filename: "l.txt"'),
        {"1/model.py": MODEL_PY, "l.txt": "cat\n"},
    ),
    "linked model": lambda root: (root / "m").symlink_to(python_model(root.parent / "elsewhere", "x")),
    "linked config": lambda root: (
        python_model(root, "m"),
        (root / CONFIG).rename(root / "shared.pbtxt"),
        (root / CONFIG).symlink_to("../shared.pbtxt"),
    ),
    "another configuration": lambda root: python_model(root, "m", files={"configs/h100.pbtxt": PYTHON + IO}),
    "comment with a placeholder": lambda root: python_model(root, "m", "# max_batch_size: ${batch}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOUND)
def test_sound_repositories_have_no_finding(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    SOUND[kind](root)
    findings = lint_repository(root)
    assert said(findings) == []


FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "no file": (lambda root: write_model(root, "m", PYTHON + IO), "TC-604", "m/1/model.py", "missing"),
    "no onnx": (lambda root: write_model(root, "m", ONNX), "TC-604", "m/1/model.onnx", "loads model.onnx"),
    "no version": (
        lambda root: write_model(root, "m", PYTHON, version=False), "TC-604", "m", "no version directory",
    ),
    "version with a letter": (
        lambda root: write_model(root, "m", PYTHON, {"v1/model.py": MODEL_PY}, version=False),
        "TC-652", "m/v1", "is no version",
    ),
    "version with zeros": (lambda root: python_model(root, "m", files={"02/x": ""}), "TC-652", "m/02", "is no version"),
    "version by prefix": (lambda root: python_model(root, "m", files={"2b/x": ""}), "TC-652", "m/2b", "as version 2"),
    "version too large": (
        lambda root: python_model(root, "m", files={f"{2**63}/x": ""}), "TC-652", f"m/{2**63}", "63 bits",
    ),
    "syntax": (
        lambda root: write_model(root, "m", PYTHON + IO, {"1/model.py": "x = 1\ndef f(:\n"}),
        "TC-651", "m/1/model.py:2:7", "invalid syntax",
    ),
    "no class": (
        lambda root: write_model(root, "m", PYTHON + IO, {"1/model.py": "x = 1\n"}),
        "TC-651", "m/1/model.py", "no class TritonPythonModel",
    ),
    "binary code": (
        lambda root: write_model(root, "m", PYTHON + IO, {"1/model.py": b"\0\1\2"}), "TC-651", "m/1/model.py", "",
    ),
    "vllm without model": (
        lambda root: write_model(root, "m", 'backend: "vllm"', {"1/model.json": "{}"}),
        "TC-651", "m/1/model.json", "`model`",
    ),
    "vllm without json": (
        lambda root: write_model(root, "m", 'backend: "vllm"', {"1/model.json": '{\n"model" "x"}'}),
        "TC-651", "m/1/model.json:2:9", "no JSON",
    ),
    "config in the version": (
        lambda root: write_model(root, "m", None, {"1/config.pbtxt": PYTHON}),
        "TC-607", "m/config.pbtxt", "m/1/config.pbtxt is in the wrong place",
    ),
    "hidden directory": (
        lambda root: (python_model(root, "m"), (root / ".git").mkdir()), "TC-604", ".git/config.pbtxt", "missing",
    ),
    "folder": (lambda root: (python_model(root, "m"), (root / "assets").mkdir()), "TC-604", "assets/config.pbtxt", ""),
    "one level below": (
        lambda root: python_model(root / "models", "m"), "TC-604", "models/config.pbtxt", "give models/ as repository",
    ),
    "link to nothing": (
        lambda root: (python_model(root, "m"), (root / "n").symlink_to("gone")), "TC-650", "n", "a link to nothing",
    ),
    "version linked to nothing": (
        lambda root: (python_model(root, "m") / "2").symlink_to("gone"), "TC-650", "m/2", "a link to nothing",
    ),
    "config linked to nothing": (
        lambda root: (write_model(root, "m", None) / "config.pbtxt").symlink_to("gone"), "TC-650", CONFIG, "link",
    ),
    "config is a directory": (
        lambda root: write_model(root, "m", None, {"config.pbtxt/x": ""}), "TC-650", CONFIG, "a directory",
    ),
    "config is a pipe": (
        lambda root: os.mkfifo(write_model(root, "m", None) / "config.pbtxt"), "TC-650", CONFIG, "no regular file",
    ),
    "config is huge": (
        lambda root: os.truncate(write_model(root, "m", "") / "config.pbtxt", 2**40), "TC-650", CONFIG, "bytes",
    ),
    "link in a circle": (
        lambda root: (python_model(root, "m"), (root / "o").symlink_to("o")), "TC-650", "o", "a link to nothing",
    ),
    "deep": (lambda root: write_model(root, "m", "input {" * 5000), "TC-601", CONFIG, ""),
    "another configuration": (
        lambda root: python_model(root, "m", files={"configs/h100.pbtxt": "backnd: 1"}),
        "TC-601", "m/configs/h100.pbtxt:1:1", "backnd",
    ),
    "force cpu": (
        lambda root: python_model(
            root, "m", '\nparameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "on" } }'
        ),
        "TC-602", f"{CONFIG}:5:1", "'on'",
    ),
    "environment": (
        lambda root: python_model(
            root, "m", 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "$$TRITON_MODEL_DIRECTORY/e" } }'
        ),
        "TC-610", f"{CONFIG}:4:1", "does not exist",
    ),
    "state with free sizes": (
        lambda root: python_model(
            root, "m",
            "max_batch_size: 1 sequence_batching { state [ { input_name: \"I\" output_name: \"O\" data_type: TYPE_FP32 "
            "dims: [ -1 ] initial_state { name: \"i\" dims: [ -1 ] data_type: TYPE_FP32 zero_data: true } } ] }",
        ),
        "TC-653", CONFIG, "free sizes",
    ),
    "batch in parts of an ensemble": (
        lambda root: (
            python_model(root, "p"),
            write_model(root, "m", ensemble(step("p", {"a": "IN"}, {"b": "OUT"}), more="max_batch_size: 2")),
        ),
        "TC-602", CONFIG, "shapes differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_found_at_their_place(kind: str, tmp_path: Path) -> None:
    plant, code, where, message = FAULTS[kind]
    root = tmp_path / "repository"
    root.mkdir()
    plant(root)
    findings = lint_repository(root)
    assert any(
        item.code == code and item.where.startswith(where) and message in str(item) for item in findings
    ), said(findings)


def test_a_model_alone_is_taken_for_a_repository_of_it(tmp_path: Path) -> None:
    model = python_model(tmp_path, "m", "max_batch_size: -1")
    assert [item.where for item in lint_repository(model)] == [f"{CONFIG}:4:1"]


def test_findings_are_sorted_by_place(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_model(tmp_path, name, NULL + IO.replace("[ 4 ]", "[ 0 ]") * 6, {"libtriton_null.so": ""})
    places = [item.where.split(":")[:2] for item in lint_repository(tmp_path) if "dims" in item.message]
    assert [file[0] for file, _ in places] == ["a"] * 12 + ["b"] * 12
    assert [int(line) for _, line in places[:12]] == list(range(2, 14))


def test_endpoints_of_decoupled_models(tmp_path: Path) -> None:
    python_model(tmp_path, "plain")
    python_model(tmp_path, "stream", "model_transaction_policy { decoupled: true }")
    write_model(tmp_path, "over", ensemble(step("stream", {"a": "IN"}, {"b": "OUT"})))
    found = {item.model: item for item in read_and_lint(tmp_path).models}
    assert [name for name, item in found.items() if item.decoupled] == ["over", "stream"]
    assert "HTTP infer" in found["plain"].endpoints and "HTTP infer" not in found["stream"].endpoints


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_a_finding(tmp_path: Path) -> None:
    model = python_model(tmp_path, "m")
    model.chmod(0)
    try:
        assert [item.code for item in lint_repository(tmp_path)] == ["TC-650"]
    finally:
        model.chmod(0o700)


def render(tmp_path: Path, **values: object) -> Path:
    """The llmapi repository of an engine of 1.2.1, with ``values`` in its model.yaml."""
    repository = render_repository(write_engine(tmp_path / "engine", target="trtllm"), tmp_path / "r")
    path = repository / "tensorrt_llm" / "1" / "model.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}, sort_keys=False))
    return repository


def test_keys_of_model_yaml_by_release(tmp_path: Path) -> None:
    """enable_trtllm_sampler ended with 1.0, moe_config.backend TRITON came with 1.1; no release has the third."""
    repository = render(
        tmp_path, enable_trtllm_sampler=True, moe_config={"backend": "TRITON"}, enable_magic=True
    )
    path = repository / "tensorrt_llm" / "1" / "model.yaml"

    def found(**options: str) -> list[str]:
        return [item.where.rpartition(": ")[2] for item in errors(lint_repository(repository, **options))]

    assert found() == ["enable_trtllm_sampler", "enable_magic"]  # engine.json says 1.2.1
    assert found(release="1.0.0") == ["moe_config.backend", "enable_magic"]
    (tmp_path / "engine" / "engine.json").unlink()
    assert found() == ["enable_magic"]
    line = path.read_text().splitlines().index("enable_magic: true") + 1
    (unknown,) = errors(lint_repository(repository))
    assert unknown.code == "TC-404" and unknown.where.endswith(f"1/model.yaml:{line}:1: enable_magic")
    with pytest.raises(UsageError):
        lint_repository(repository, release="newest")


def test_model_yaml_against_the_engine_and_its_gpus(tmp_path: Path) -> None:
    repository = render(tmp_path, max_batch_size=9, max_seq_len=512)  # planned: 8 and 512
    (finding,) = lint_repository(repository)
    assert (finding.code, finding.severity) == ("TC-656", "warning")
    assert "max_batch_size is 9" in finding.message and "planned for 8" in finding.message
    config = repository / "tensorrt_llm" / "config.pbtxt"
    for lists, fits in (("0,1", True), ("0", False)):  # the engine has tp 2
        text = config.read_text().split("\nparameters")[0]
        config.write_text(
            f'{text}\nparameters {{ key: "gpu_device_ids" value {{ string_value: "{lists}" }} }}'
        )
        assert [item.code for item in errors(lint_repository(repository))] == ([] if fits else ["TC-608"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "given twice"),
        ("- 1\n", "expected a mapping"),
        ("a: [1\n", ""),
        ("a: !!python/object:os.system x\n", ""),
        ("a: 2021-99-99\n", ""),
        ("b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 40)), "nodes"),
        ("[" * 3000, ""),
        ("\0", ""),
    ],
)  # fmt: skip
def test_yaml_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    repository = render(tmp_path)
    (repository / "tensorrt_llm" / "1" / "model.yaml").write_text(text)
    assert any(item.code == "TC-609" and message in item.message for item in lint_repository(repository))


def test_engine_limits_of_the_tensorrt_backend(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    built = {
        "build_config": {"max_batch_size": 4, "max_beam_width": 1},
        "pretrained_config": {"mapping": {"world_size": 2}},
    }
    (engine / "config.json").write_text(json.dumps(built))
    (engine / "rank0.engine").write_text("")
    parameters = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(engine),
        "max_beam_width": "2",
    }
    write_model(
        tmp_path / "r",
        "tensorrt_llm",
        f'backend: "tensorrtllm"\n{IO}max_batch_size: 8\ndynamic_batching {{ preferred_batch_size: [ 8 ] }}\n'
        + "".join(
            f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in parameters.items()
        ),
    )
    assert [(item.code, item.where.split(":")[1]) for item in lint_repository(tmp_path / "r")] == [
        ("TC-656", "4"),
        ("TC-656", "5"),
        ("TC-604", "7"),
        ("TC-656", "8"),
    ]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"max_waiting": -1}, "TC-602"),
        ({"max_queue_s": "5"}, "TC-602"),
        ({"engine_dir": 5}, "TC-602"),
        ({"kv_layout": "pages"}, "TC-602"),
        ({"kernels": ["off"]}, "TC-602"),
        ({"max_wating": 5}, "TC-602"),
        ({"engine_dir": "/nowhere"}, "TC-610"),
    ],
)
def test_served_json_of_each_version(change: dict[str, object], code: str, tmp_path: Path) -> None:
    """Also of a version that only an update will load."""
    repository = render_repository(write_engine(tmp_path / "engine"), tmp_path / "r")
    model = repository / "tensorrt_llm"
    (model / "1").rename(model / "2")
    served = model / "2" / "served.json"
    served.write_text(json.dumps({**json.loads(served.read_text()), **change}))
    found = [
        item for item in lint_repository(repository) if item.where.startswith("tensorrt_llm/2/served.json")
    ]
    assert [item.code for item in found] == [code]


def test_every_rule_has_a_code_that_is_explained() -> None:
    rules = [rule for found in SUBJECTS.values() for rule in found]
    assert {rule.code for rule in rules} <= set(CODES)
    assert len({rule.says for rule in rules}) == len(rules)


def test_the_table_in_the_readme_is_that_of_the_rules() -> None:
    """Written with: python -m toolchain.triton.rules.table"""
    readme = Path(__file__).parent.parent / "toolchain" / "triton" / "rules" / "README.md"
    assert markdown() in readme.read_text(encoding="utf-8")


TOKENS = st.sampled_from(
    ["input", "output", "name", "{", "}", "[", "]", ":", ",", '"a"', "'b'", "-1", "4", "#", "\n", "dims", "<", ">", '"',
     "ensemble_scheduling", "step", "${x}", "parameters", "key", "value", "instance_group", "\\", "\ufeff", "é"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(TOKENS, max_size=60).map(" ".join) | st.text(max_size=80), raw=st.binary(max_size=80))
def test_whatever_stands_there_there_is_no_traceback(text: str, raw: bytes, tmp_path: Path) -> None:
    model = python_model(tmp_path / str(len(list(tmp_path.iterdir()))), "m")
    (model / "config.pbtxt").write_text(text, encoding="utf-8", errors="replace")
    (model / "1" / "model.py").write_bytes(raw)
    lint_repository(model.parent)
    read_places(words(text))


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.sampled_from([" ", "\n", "\n\n  ", " # input [ {\n", "\t"]), min_size=8, max_size=8),
    count=st.integers(1, 4),
    listed=st.booleans(),
)
def test_places_are_those_of_the_text(gaps: list[str], count: int, listed: bool) -> None:
    """The lines and columns of `dims` in texts that are put together from parts."""
    items = []
    for index in range(count):
        gap = gaps[index]
        items.append(f'{{{gap}name: "n{index}"{gap}dims:{gaps[-1]}[ {index + 1} ]{gaps[4]}}}')
    text = f"input{gaps[5]}[ {', '.join(items)} ]" if listed else "\n".join(f"input {item}" for item in items)
    text = f"backend: 'x'{gaps[6]}{text}"
    places = read_places(words(text))
    at = -1
    for index in range(count):
        at = text.index("dims:", at + 1)
        node = places.find("input", index, "dims", 0)
        line, start = text.count("\n", 0, at) + 1, text.rfind("\n", 0, at) + 1
        # An element of a list stands where its value does.
        value = text.index(str(index + 1), at)
        line, start = text.count("\n", 0, value) + 1, text.rfind("\n", 0, value) + 1
        assert node.place == f"{line}:{value - start + 1}"
