"""The lint's verdict on broken and sound models against what the real tritonserver does with each.

The models are of a backend that does nothing, so that only the server's core judges.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.model_repositories import IO, NULL, ensemble, null_backend, step, write_model
from toolchain.core.errors import ToolchainError
from toolchain.core.findings import errors
from toolchain.core.progress import Silent
from toolchain.triton.install import find_server
from toolchain.triton.lint import lint_repository
from toolchain.triton.lint_load import BareServer
from toolchain.triton.load import load_model

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-in backend"),
]
B = NULL + IO


def inputs(text: str) -> str:
    """A model whose input has more than, or other than, `dims: [ 4 ]`."""
    return NULL + IO.replace("dims: [ 4 ]", text, 1)


def sequence(text: str) -> str:
    return f"{B}max_batch_size: 8\nsequence_batching {{ {text} }}\n"


def control(name: str, text: str) -> str:
    return f'{{ name: "{name}" control [ {{ {text} }} ] }}'


def twice(kind: str, name: str) -> str:
    return NULL + IO.replace(f"{kind} [", f'{kind} [ {{ name: "{name}" data_type: TYPE_FP32 dims: [ 4 ] }},')


def warmup(text: str, more: str = "") -> str:
    return f'{B}{more}\nmodel_warmup [ {{ name: "w" batch_size: 1 {text} }} ]\n'


START = "kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ]"
STATE = 'state [ { input_name: "I" output_name: "O" data_type: TYPE_FP32 dims: [ 4 ] initial_state { %s } } ]'
SAMPLE = 'inputs { key: "%s" value { data_type: TYPE_%s dims: [ %s ] %s } }'
A, OUT = {"a": "IN"}, {"b": "OUT"}
TWO = (
    'input [ { name: "a" data_type: TYPE_FP32 dims: [ 4 ] }, { name: "c" data_type: TYPE_FP32 dims: [ 4 ]%s } ]\n'
    + IO.split("\n")[1]
)
DELAY = "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 }"

SOUND = {
    "plain": B,
    "named": B + 'name: "named"',
    "no_io": NULL,
    "crlf": B.replace("\n", "\r\n"),
    "no_utf8": B.encode() + b"# caf\xe9\n",
    "empty_parameter": B + 'parameters { key: "x" }',
    "directory_of_its_model": B + 'parameters { key: "x" value { string_value: "$$TRITON_MODEL_DIRECTORY/x" } }',
    "reshape": inputs("dims: [ 4 ] reshape { shape: [ 2, 2 ] }"),
    "reshape_free": inputs("dims: [ 2, 4, -1, 6 ] reshape { shape: [ 8, -1, 1, 6 ] }"),
    "reshape_scalar": inputs("dims: [ 1 ] reshape { shape: [ ] }") + "max_batch_size: 2",
    "ragged": inputs("dims: [ -1 ] allow_ragged_batch: true"),
    "dynamic": B + "max_batch_size: 4\ndynamic_batching { preferred_batch_size: [ 2, 4 ] }",
    "dynamic_without_batch": B + "dynamic_batching { }",
    "priorities": B + "max_batch_size: 4\ndynamic_batching { priority_levels: 2 default_priority_level: 1 }",
    "sequence_alone": sequence(""),
    "sequence_start": sequence(f"control_input [ {control('S', START)} ]"),
    "sequence_id": sequence(
        f"control_input [ {control('C', 'kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING')} ]"
    ),
    "sequence_oldest": sequence("oldest { max_candidate_sequences: 4 preferred_batch_size: [ 8 ] }"),
    "sequence_state": sequence(STATE % 'name: "i" dims: [ 4 ] data_type: TYPE_FP32 zero_data: true'),
    "decoupled": B + "max_batch_size: 2\nmodel_transaction_policy { decoupled: true }\ndynamic_batching { }",
    "cached": B + "response_cache { enable: true }",
    "no_count": B + "instance_group [ { kind: KIND_CPU count: 0 } ]",
    "batch_input": B
    + 'batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: "t" data_type: TYPE_FP32 source_input: "a" } ]',
    "all_versions": B + "version_policy { all { } }",
    "no_policy": B + "version_policy { }",
    "some_versions": B + "version_policy { specific { versions: [ 1, 2 ] } }",
    "ensemble": ensemble(step("plain", A, OUT)),
    "ensemble_any_order": ensemble(step("named", {"a": "m"}, OUT), step("plain", A, {"b": "m"})),
    "ensemble_optional_input": ensemble(step("optional", A, OUT)),
    "ensemble_of_ensemble": ensemble(step("ensemble", {"IN": "IN"}, {"OUT": "OUT"})),
    "ensemble_of_version": ensemble(step("plain", A, OUT, version=1)),
    "ensemble_of_free_sizes": ensemble(step("free", A, OUT)),
    "ensemble_decoupled": ensemble(step("decoupled", A, OUT), more="max_batch_size: 2"),
    "ensemble_smaller_batch": ensemble(step("dynamic", A, OUT), more="max_batch_size: 2"),
    "optional": NULL + TWO % " optional: true",
    "free": inputs("dims: [ -1 ]"),
}  # fmt: skip
"""Loaded by the server; no error of the lint."""

BROKEN = {
    "negative_batch": B + "max_batch_size: -4",
    "negative_dim": inputs("dims: [ -7 ]"),
    "zero_dim": inputs("dims: [ 0 ]"),
    "no_dims": inputs(""),
    "no_type": NULL + IO.replace("data_type: TYPE_FP32", "", 1),
    "no_name": NULL + IO.replace('name: "a"', "", 1),
    "other_name": B + 'name: "other"',
    "empty": "",
    "comment": "# nothing\n",
    "bom": b"\xef\xbb\xbf" + B.encode(),
    "utf16": B.encode("utf-16"),
    "binary": bytes(range(256)),
    "batch_placeholder": B + "max_batch_size: ${batch}",
    "scalar_twice": B + "max_batch_size: 1\nmax_batch_size: 2",
    "unknown_field": B + "max_batchsize: 1",
    "unknown_word": NULL + IO.replace("TYPE_FP32", "FLOAT", 1),
    "reshape_size": inputs("dims: [ 4 ] reshape { shape: [ 2, 3 ] }"),
    "reshape_order": inputs("dims: [ 2, -1 ] reshape { shape: [ -1, 2 ] }"),
    "reshape_zero": inputs("dims: [ 4 ] reshape { shape: [ 0 ] }"),
    "reshape_nothing": inputs("dims: [ 1 ] reshape { shape: [ ] }"),
    "format": inputs("dims: [ 4 ] format: FORMAT_NHWC"),
    "shape_tensor": inputs("dims: [ 4 ] is_shape_tensor: true"),
    "non_linear": inputs("dims: [ 4 ] is_non_linear_format_io: true"),
    "label_missing": NULL + IO.replace('name: "b"', 'name: "b" label_filename: "l.txt"'),
    "preferred_large": B + "max_batch_size: 4\ndynamic_batching { preferred_batch_size: [ 8 ] }",
    "preferred_zero": B + "max_batch_size: 4\ndynamic_batching { preferred_batch_size: [ 0 ] }",
    "preferred_no_batch": B + "dynamic_batching { preferred_batch_size: [ 1 ] }",
    "priority_none": B + "max_batch_size: 4\ndynamic_batching { priority_levels: 2 }",
    "priority_policy": B
    + "max_batch_size: 4\ndynamic_batching { priority_levels: 1 default_priority_level: 1 "
    "priority_queue_policy { key: 3 value { max_queue_size: 1 } } }",
    "ordering_priorities": B
    + "max_batch_size: 4\ndynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
    "ordering_delay": B + f"max_batch_size: 4\ndynamic_batching {{ preserve_ordering: true {DELAY} }}",
    "two_schedulers": B + "max_batch_size: 4\ndynamic_batching { }\nsequence_batching { }",
    "control_nameless": sequence("control_input [ { control [ { " + START + " } ] } ]"),
    "control_twice": sequence(f"control_input [ {control('S', START)}, {control('T', START)} ]"),
    "control_same_name": sequence(
        f"control_input [ {control('S', START)}, {control('S', START.replace('START', 'END'))} ]"
    ),
    "control_one_value": sequence(f"control_input [ {control('S', START.replace('0, 1', '0'))} ]"),
    "control_no_value": sequence(f"control_input [ {control('S', 'kind: CONTROL_SEQUENCE_END')} ]"),
    "control_two_kinds": sequence(f"control_input [ {control('S', START + ' fp32_false_true: [ 0, 1 ]')} ]"),
    "control_id_type": sequence(
        f"control_input [ {control('C', 'kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32')} ]"
    ),
    "oldest_large": sequence("oldest { preferred_batch_size: [ 16 ] }"),
    "slot_share": sequence("direct { minimum_slot_utilization: 1.5 }"),
    "sequence_cached": sequence("") + "response_cache { enable: true }",
    "state_name": sequence(STATE % "dims: [ 4 ] data_type: TYPE_FP32 zero_data: true"),
    "state_type": sequence(STATE % 'name: "i" dims: [ 4 ] data_type: TYPE_INT32 zero_data: true'),
    "state_dims": sequence(STATE % 'name: "i" dims: [ 5 ] data_type: TYPE_FP32 zero_data: true'),
    "state_file": sequence(STATE % 'name: "i" dims: [ 4 ] data_type: TYPE_FP32 data_file: "none"'),
    "decoupled_cached": B + "model_transaction_policy { decoupled: true }\nresponse_cache { enable: true }",
    "cpu_gpus": B + "instance_group [ { kind: KIND_CPU gpus: [ 0 ] } ]",
    "model_gpus": B + "instance_group [ { kind: KIND_MODEL gpus: [ 0 ] } ]",
    "profile": B + 'instance_group [ { kind: KIND_CPU profile: [ "0" ] } ]',
    "batch_source": B
    + 'batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: "t" data_type: TYPE_FP32 source_input: "z" } ]',
    "batch_type": B
    + 'batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: "t" data_type: TYPE_INT64 source_input: "a" } ]',
    "batch_target": B
    + 'batch_output [ { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "z" source_input: "a" } ]',
    "latest_none": B + "version_policy { latest { } }",
    "version_absent": B + "version_policy { specific { versions: [ 2 ] } }",
    "backend": IO + 'backend: "pyton"',
    "backend_capital": IO + 'backend: "Python"',
    "platform": IO + 'platform: "foo"',
    "scheduling_alone": IO + "ensemble_scheduling { }",
    "warmup_free": warmup(SAMPLE % ("a", "FP32", "-1", "zero_data: true")),
    "warmup_no_data": warmup(SAMPLE % ("a", "FP32", "4", "")),
    "warmup_no_file": warmup(SAMPLE % ("a", "FP32", "4", 'input_data_file: "x"')),
    "warmup_type": warmup(SAMPLE % ("a", "INT32", "4", "zero_data: true")),
    "warmup_shape": warmup(SAMPLE % ("a", "FP32", "5", "zero_data: true")),
    "warmup_other": warmup(SAMPLE % ("z", "FP32", "4", "zero_data: true")),
    "warmup_nothing": warmup(""),
    "ensemble_no_steps": ensemble(),
    "ensemble_unscheduled": 'platform: "ensemble"\n' + IO,
    "ensemble_no_model": ensemble(step("nowhere", A, OUT)),
    "ensemble_no_version": ensemble(step("plain", A, OUT, version=3)),
    "ensemble_version_0": ensemble(step("plain", A, OUT, version=0)),
    "ensemble_nameless": ensemble(step("", A, OUT)),
    "ensemble_no_inputs": ensemble(step("plain", {}, OUT)),
    "ensemble_no_outputs": ensemble(step("plain", A, {})),
    "ensemble_backend": ensemble(step("plain", A, OUT), more=NULL),
    "ensemble_instances": ensemble(step("plain", A, OUT), more="instance_group [ { kind: KIND_CPU } ]"),
    "ensemble_warmup": ensemble(step("plain", A, OUT), more='model_warmup [ { name: "w" } ]'),
    "ensemble_loose": ensemble(step("plain", {"a": "nowhere"}, OUT)),
    "ensemble_unused": ensemble(step("plain", A, OUT), step("named", A, {"b": "unused"})),
    "ensemble_twice": ensemble(step("plain", A, OUT), step("named", A, OUT)),
    "ensemble_circle": ensemble(
        step("plain", {"a": "m"}, {"b": "n"}), step("named", {"a": "n"}, {"b": "m"}), step("plain", A, OUT)
    ),
    "ensemble_no_input": ensemble(step("plain", {"a": "IN", "q": "IN"}, OUT)),
    "ensemble_no_output": ensemble(step("plain", A, {"q": "OUT"})),
    "ensemble_required": ensemble(step("two", A, OUT)),
    "ensemble_type": ensemble(step("integers", A, OUT)),
    "ensemble_shape": ensemble(step("five", A, OUT)),
    "ensemble_batch": ensemble(step("dynamic", A, OUT), more="max_batch_size: 8"),
    "ensemble_itself": ensemble(step("ensemble_itself", {"IN": "IN"}, {"OUT": "OUT"})),
    "ensemble_two_origins": ensemble(
        step("decoupled", A, {"b": "m"}), step("two", {"a": "m", "c": "IN"}, OUT), more="max_batch_size: 2"
    ),
    "ensemble_cached": ensemble(
        step("decoupled", A, OUT), more="max_batch_size: 2\nresponse_cache { enable: true }"
    ),
}  # fmt: skip
"""Refused by the server; an error of the lint."""

STRICTER = {
    "input_twice": (twice("input", "a"), "2 times"),
    "output_twice": (twice("output", "b"), "2 times"),
    "placeholder": (B + 'parameters { key: "x" value { string_value: "${y}" } }', "unfilled placeholder ${y}"),
    "negative_count": (B + "instance_group [ { kind: KIND_CPU count: -1 } ]", "count -1"),
    "state_unnamed": (sequence('state [ { input_name: "I" data_type: TYPE_FP32 dims: [ 4 ] } ]'), "output_name"),
}  # fmt: skip
"""Loaded by the server, which then serves something else than was written; an error of the lint, and its reason."""
HELPERS = {
    "two": NULL + TWO % "",
    "integers": inputs("dims: [ 4 ]").replace("FP32", "INT32", 1),
    "five": inputs("dims: [ 5 ]"),
}
SOUND |= HELPERS
ALL: dict[str, str | bytes] = {**SOUND, **BROKEN, **{name: text for name, (text, _) in STRICTER.items()}}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("agrees")
    library = null_backend(root)
    assert library is not None
    for name, config in ALL.items():
        model = write_model(root / "repository", name, config)
        shutil.copyfile(library, model / library.name)
    return root / "repository"


class Judge:
    """A server that is started again when it ends: a model that fails late sometimes takes it along."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.server = self.start()

    def start(self) -> BareServer:
        server = BareServer(self.repository, log_file=self.repository.parent / "log", progress=Silent())
        server.start()
        return server

    def loads(self, model: str) -> bool:
        try:
            load_model(self.server.grpc_url, model, timeout_s=30)
        except ToolchainError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert self.server.process is not None
                self.server.process.wait(0.1)
                self.server.kill()
                self.server = self.start()
            return False
        return True


@pytest.fixture(scope="module")
def judge(repository: Path) -> Iterator[Judge]:
    running = Judge(repository)
    yield running
    running.server.kill()


@pytest.fixture(scope="module")
def found(repository: Path) -> dict[str, list[str]]:
    """Model -> the errors of the lint about it, each as text."""
    result: dict[str, list[str]] = {name: [] for name in ALL}
    for finding in errors(lint_repository(repository)):
        result[finding.where.split("/")[0].split(":")[0]].append(str(finding))
    return result


@pytest.mark.parametrize("model", SOUND)
def test_what_the_server_loads_has_no_error(model: str, judge: Judge, found: dict[str, list[str]]) -> None:
    assert judge.loads(model)
    assert found[model] == []


@pytest.mark.parametrize("model", BROKEN)
def test_what_the_server_refuses_has_one(model: str, judge: Judge, found: dict[str, list[str]]) -> None:
    assert not judge.loads(model)
    assert found[model]


@pytest.mark.parametrize("model", STRICTER)
def test_what_the_server_loads_and_cannot_mean(model: str, judge: Judge, found: dict[str, list[str]]) -> None:
    assert judge.loads(model)
    assert any(STRICTER[model][1] in text for text in found[model])
