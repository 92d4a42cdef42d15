"""The recorded arguments of TensorRT-LLM's LLM API and the script that records them, against pydantic itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml

from toolchain.build.llmapi import argument_findings, find_record, read_records
from toolchain.build.llmapi.check import _Check
from toolchain.build.llmapi.extract import main
from toolchain.build.llmapi.records import ROOT, Record, record_of
from toolchain.core.findings import errors
from toolchain.targets import TRTLLM

SOURCE = '''
"""In the manner of tensorrt_llm/llmapi/llm_args.py: strict pydantic models, enums, unions with a tag, aliases."""
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Dict, List, Literal, Optional, Set, TypeAlias, Union

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, PrivateAttr


class StrictBaseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class Policy(str, Enum):
    FIRST = "FIRST"
    SECOND = "SECOND"


class Balancer(StrictBaseModel):
    num_slots: Optional[int] = None
    placed: Optional[Dict[int, List[int]]] = Field(default=None, repr=False)
    _rank: Optional[int] = PrivateAttr(default=None)


Gemm = Literal["one", "two"]


class Experts(StrictBaseModel):
    backend: Literal["AUTO", "CUTLASS"] = Field(default="AUTO", description="x")
    load_balancer: Optional[Union[Balancer, str]] = Field(default=None)
    allowed: List[Gemm] = Field(default_factory=lambda: ["one"])


class Cache(StrictBaseModel):
    fraction: Optional[float] = Field(default=0.9, ge=0, le=1)
    windows: Optional[List[PositiveInt]] = None
    size: int = Field(default=1024**3)
    policy: Policy = Field(default=Policy.FIRST)


class DecodingBase(StrictBaseModel):
    max_draft_len: Optional[NonNegativeInt] = None
    draft: Optional[Union[str, Path]] = Field(default=None, validation_alias=AliasChoices("draft", "draft_dir"))
    schedule: Optional[dict[int, int]] = None


class Mtp(DecodingBase):
    decoding_type: Literal["MTP"] = "MTP"
    layers: PositiveInt = Field(default=1)


class Eagle(DecodingBase):
    decoding_type: Literal["Eagle"] = "Eagle"
    captured: Optional[Set[int]] = None


Speculative: TypeAlias = Annotated[Union[Mtp, Eagle], Field(discriminator="decoding_type")]


class BaseLlmArgs(StrictBaseModel):
    tensor_parallel_size: int = Field(default=1)
    backend: Optional[str] = None
    extra: Optional[Dict[str, Any]] = None
    kind: ClassVar[str] = "x"


class TorchLlmArgs(BaseLlmArgs):
    backend: Literal["pytorch"] = Field(default="pytorch")
    experts: Experts = Field(default_factory=Experts)
    cache: Cache = Field(default_factory=Cache)
    speculative: Optional[Speculative] = Field(default=None)
    padding: bool | None = None
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, Record]]:
    """(the module, what the script records of its text)."""
    path = tmp_path_factory.mktemp("llm_args") / "llm_args_like.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("llm_args_like", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["llm_args_like"] = module
    spec.loader.exec_module(module)
    document = yaml.safe_load(main([str(path), "9.9.9", "a test"]))
    yield module, record_of({"9.9.9": document}, "9.9.9")
    del sys.modules["llm_args_like"]


def test_the_script_records_the_fields_that_pydantic_has(made: tuple[ModuleType, Record]) -> None:
    module, record = made
    assert set(record.classes) == {
        "TorchLlmArgs",
        "BaseLlmArgs",
        "Experts",
        "Balancer",
        "Cache",
        "DecodingBase",
        "Mtp",
        "Eagle",
    }
    for name, keys in record.classes.items():
        fields = getattr(module, name).model_fields
        aliases = {"draft_dir"} if "draft" in fields else set()
        assert set(keys) == set(fields) | aliases
        for key in set(keys) - aliases:
            default = fields[key].default
            if keys[key].default is not None:
                expected = default.value if hasattr(default, "value") else default
                expected = fields[key].default_factory() if fields[key].default_factory else expected
                assert yaml.safe_load(keys[key].default) == expected, (name, key)
            else:
                assert fields[key].is_required() or fields[key].default_factory, (name, key)


GOOD: tuple[dict[str, Any], ...] = (
    {},
    {"tensor_parallel_size": 2, "backend": "pytorch", "padding": None, "extra": {"a": [1]}},
    {
        "experts": {
            "backend": "CUTLASS",
            "load_balancer": {"num_slots": 4, "placed": {0: [1, 2]}},
            "allowed": ["two"],
        }
    },
    {"experts": {"load_balancer": "/a/file.yaml"}},
    {"experts": {"load_balancer": {"placed": {"0": [1]}}}},
    {"cache": {"fraction": None, "windows": [1, 2], "size": 5, "policy": "SECOND"}},
    {"cache": {"fraction": 1}},
    {"speculative": {"decoding_type": "MTP", "layers": 2, "schedule": {1: 4}, "draft_dir": "x"}},
    {"speculative": {"decoding_type": "Eagle", "captured": [1, 2], "draft": "y"}},
    {"speculative": None},
)
BAD: tuple[dict[str, Any], ...] = (
    {"tensor_parallel": 2},
    {"tensor_parallel_size": None},
    {"tensor_parallel_size": 1.5},
    {"backend": "tensorrt"},
    {"experts": {"backend": "cutlass"}},
    {"experts": {"load_balancer": {"slots": 4}}},
    {"experts": {"load_balancer": 4}},
    {"experts": {"allowed": ["three"]}},
    {"experts": []},
    {"cache": {"fraction": 1.1}},
    {"cache": {"windows": [0]}},
    {"cache": {"policy": "THIRD"}},
    {"cache": None},
    {"speculative": {"decoding_type": "mtp"}},
    {"speculative": {"layers": 1}},
    {"speculative": {"decoding_type": "MTP", "layers": 0}},
    {"speculative": {"decoding_type": "MTP", "captured": [1]}},
    {"speculative": {"decoding_type": "Eagle", "max_draft_len": -1}},
    {"speculative": {"decoding_type": "Eagle", "schedule": {"a": 1}}},
)


@pytest.mark.parametrize("arguments", [*GOOD, *BAD], ids=str)
def test_the_check_decides_as_pydantic_does(
    made: tuple[ModuleType, Record], arguments: dict[str, Any]
) -> None:
    import pydantic

    module, record = made
    try:
        module.TorchLlmArgs(**arguments)
        accepted = True
    except pydantic.ValidationError:
        accepted = False
    assert accepted is (arguments in GOOD), "the case itself"
    found = list(_Check(record=record, version="1.2.1", where="test").all(arguments))
    assert (not errors(found)) is accepted, "\n".join(map(str, found))


@pytest.mark.parametrize(
    "arguments", [{"tensor_parallel_size": "2"}, {"tensor_parallel_size": True}, {"padding": 1}], ids=str
)
def test_what_pydantic_would_convert_is_refused(
    made: tuple[ModuleType, Record], arguments: dict[str, Any]
) -> None:
    """Text for a number is a slip in a YAML file, also where pydantic lets it pass."""
    module, record = made
    module.TorchLlmArgs(**arguments)
    assert errors(list(_Check(record=record, version="1.2.1", where="test").all(arguments)))


def test_every_release_of_the_target_has_a_record() -> None:
    records = read_records()
    assert [record.since for record in records] == [
        "1.0.0",
        "1.1.0",
        "1.2.0",
        "1.3.0rc20",
        "1.3.0rc27",
        "1.4.0rc0",
    ]
    chosen = {version: find_record(version).since for version in TRTLLM.versions}
    assert chosen["1.2.0"] == chosen["1.2.1"] == "1.2.0"
    assert (
        chosen["1.3.0rc22"] == "1.3.0rc20"
        and chosen["1.3.0rc29"] == "1.3.0rc27"
        and chosen["1.4.0rc1"] == "1.4.0rc0"
    )
    for record in records:
        assert "NVIDIA/TensorRT-LLM" in record.source or "documentation" in record.source
        assert {"tensor_parallel_size", "moe_config", "kv_cache_config", "cuda_graph_config"} <= set(
            record.classes[ROOT]
        )
        assert record.unread <= set(record.classes)


def test_every_recorded_default_has_its_type() -> None:
    """Each record is consistent with itself: types parse, classes exist, defaults fit."""
    for record in read_records():
        check = _Check(record=record, version=record.since, where="record")
        for name, keys in record.classes.items():
            for key, argument in keys.items():
                if argument.default is not None:
                    found = list(
                        check._value(argument.type, yaml.safe_load(argument.default), f"{name}.{key}")
                    )
                    assert not found, "\n".join(map(str, found))
        for union in record.unions.values():
            assert {item for item in union.classes.values() if item != "any"} <= set(record.classes)


@pytest.mark.parametrize(
    ("version", "arguments", "words"),
    [
        ("1.2.1", {"enable_atention_dp": True}, "nearest: enable_attention_dp"),
        ("1.2.1", {"build_config": {"max_batch_size": 8}}, "refuses build_config"),
        ("1.2.1", {"moe_config": {"backend": "CUTLAS"}}, "nearest: CUTLASS"),
        ("1.2.1", {"moe_config": {"backend": "MARLIN"}}, "expects one of AUTO, CUTLASS"),
        ("1.2.1", {"speculative_config": {"decoding_type": "Eagle3"}}, "nearest: Eagle"),
        ("1.2.1", {"kv_cache_config": {"free_gpu_memory_fraction": 90}}, "a number from 0 to 1"),
        ("1.2.1", {"kv_cache_dtype": "fp8"}, "kv_cache_config.dtype"),
        ("1.1.0", {"moe_config": {"backend": "AUTO"}}, "CUTLASS"),
        ("1.1.0", {"moe_config": {"use_low_precision_moe_combine": True}}, "recorded for 1.2.0"),
        ("1.0.0", {"moe_config": {"backend": "TRITON"}}, "TRTLLM"),
        ("1.0.0", {"kv_cache_config": {"tokens_per_block": 64}}, "recorded for 1.1.0"),
        ("1.4.0rc1", {"moe_config": {"backend": "WIDEEP"}}, "MEGAMOE_CUTEDSL"),
        ("1.2.1", {"max_seq_len": "8192"}, "a whole number"),
        ("1.2.1", {"mpi_session": 1}, "no file can hold"),
    ],
)
def test_what_a_release_does_not_take_is_refused(version: str, arguments: dict[str, Any], words: str) -> None:
    """Differences between releases as their documentation has them."""
    (finding,) = errors(argument_findings(arguments, version, where="here"))
    assert finding.where.startswith("here: ") and words in f"{finding.message}; {finding.hint}"


@pytest.mark.parametrize(
    ("version", "arguments"),
    [
        (
            "1.2.1",
            {
                "speculative_config": {
                    "decoding_type": "Eagle",
                    "max_draft_len": 3,
                    "speculative_model_dir": "d",
                }
            },
        ),
        (
            "1.3.0rc22",
            {"speculative_config": {"decoding_type": "Eagle3", "max_draft_len": 3, "speculative_model": "d"}},
        ),
        (
            "1.3.0rc20",
            {"moe_config": {"backend": "MARLIN"}, "nvfp4_gemm_config": {"allowed_backends": ["marlin"]}},
        ),
        ("1.2.1", {"moe_config": {"load_balancer": {"num_slots": 288, "layer_updates_per_iter": 2}}}),
        ("1.2.1", {"cuda_graph_config": None, "torch_compile_config": {"enable_piecewise_cuda_graph": True}}),
        ("1.3.0rc20", {"sparse_attention_config": {"algorithm": "deepseek_v4", "index_topk": 512}}),
        ("1.0.0", {"enable_trtllm_sampler": True}),
        ("1.4.0rc1", {"speculative_config": {"decoding_type": "DSpark", "whatever": 1}}),
    ],
)
def test_what_a_release_takes_passes(version: str, arguments: dict[str, Any]) -> None:
    assert not errors(argument_findings(arguments, version, where="here"))


def test_what_could_not_be_read_is_said() -> None:
    assert argument_findings({}, "1.2.1", where="here") == []
    (warning,) = argument_findings({}, "1.3.0rc29", where="here")
    assert warning.code == "TC-406" and warning.severity == "warning" and "1.3.0rc27" in warning.message
    # A later line may have keys and words that nobody has recorded: they pass, with a warning.
    later = argument_findings({"quantum_config": {}, "moe_config": {"backend": "NEW"}}, "2.0.0", where="here")
    assert not errors(later) and len(later) == 3
    # A key that another release has, in a class that was not read in this one.
    (unsure, _) = argument_findings({"enable_sleep": True}, "1.3.0rc22", where="here")
    assert unsure.severity == "warning" and "as far as is known" in unsure.message
