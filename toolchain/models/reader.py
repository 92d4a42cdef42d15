"""MODEL -> ModelInfo: a local directory or a hub id, read without loading a weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.files import read_json, sha256_json
from toolchain.families import get_family
from toolchain.families.base import Family
from toolchain.families.lookup import EXPERT_COUNT_KEYS
from toolchain.models import hub
from toolchain.models.config import attention_of, need, read_config, text_config
from toolchain.models.inventory import linears_of, main_dtype
from toolchain.models.prequantized import logical_tensors, scheme_of
from toolchain.models.shards import read_tensors
from toolchain.models.types import ModelInfo, Scheme, TensorInfo

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one source holds, before it is interpreted."""

    path: Path
    """Directory with config.json and the tokenizer; the weights may still be on the hub."""
    tensors: list[TensorInfo] | None = field(repr=False)
    files: frozenset[str]
    local: bool


def read_model(
    source: str, *, revision: str | None = None, allow_download: bool = True, trust_remote_code: bool = False
) -> ModelInfo:
    """Everything that planning needs to know about ``source``, a directory or a hub id.

    Tensors come from the safetensors headers; with a config.json alone, from the model on the meta device.
    From the hub only config, tokenizer and headers are fetched. ``allow_download`` False stays within the
    local cache. Raises UsageError or ToolchainError with codes TC-010 to TC-022.
    """
    found = _find(source, revision=revision, allow_download=allow_download)
    raw = read_config(found.path)
    config = text_config(raw)
    scheme, tensors = scheme_of(config), found.tensors
    if tensors is None:
        from toolchain.models.meta import meta_tensors

        tensors = meta_tensors(str(found.path), config, trust_remote_code=trust_remote_code)
    elif scheme is not None:
        tensors = logical_tensors(scheme, tensors)
    family = get_family(
        config.get("model_type", ""),
        raw["architectures"][0],
        (tensor.name for tensor in tensors),
        config=config,
    )
    return replace(
        _info(source, found, config, tensors, family), scheme=scheme, stored_bytes=_stored(found, scheme)
    )


def resolve_model(source: str, *, revision: str | None = None, allow_download: bool = True) -> Path:
    """Local directory with every file of ``source``: itself, or the full snapshot of a hub id."""
    local = _local_directory(source)
    return local or hub.snapshot(source, revision=revision, allow_download=allow_download)


def model_identity(info: ModelInfo) -> str:
    """Hex SHA-256 over config.json and every tensor's name, dtype, shape and file."""
    tensors = sorted([tensor.name, tensor.dtype, list(tensor.shape), tensor.file] for tensor in info.tensors)
    return sha256_json({"config": info.config, "tensors": tensors})


def _local_directory(source: str) -> Path | None:
    """The directory that ``source`` names; None for a hub id. UsageError when it can be neither."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise UsageError(
                f"{path} is an empty directory", hint="give a Hugging Face model directory", code="TC-012"
            )
        return path.resolve()
    if path.exists():
        raise UsageError(
            f"{path} is a file, expected a model directory",
            hint=f"give the directory that holds it: {path.parent}",
            code="TC-011",
        )
    if not hub.is_hub_id(source):
        raise hub.refuse_source(source)
    return None


def _find(source: str, *, revision: str | None, allow_download: bool) -> _Found:
    path = _local_directory(source) or hub.cached_snapshot(source, revision=revision)
    if path is not None:
        return _Found(path=path, tensors=read_tensors(path), files=_names(path), local=True)
    small = hub.snapshot(source, revision=revision, allow_download=allow_download, patterns=hub.SMALL_FILES)
    if not allow_download or hub.is_offline():
        return _Found(path=small, tensors=None, files=_names(small), local=True)
    tensors = hub.remote_tensors(source, revision=revision)
    return _Found(path=small, tensors=tensors, files=_names(small), local=False)


def _stored(found: _Found, scheme: Scheme | None) -> int:
    return sum(tensor.bytes for tensor in found.tensors) if scheme and found.tensors else 0


def _names(path: Path) -> frozenset[str]:
    return frozenset(item.name for item in path.iterdir())


def _info(
    source: str, found: _Found, config: dict[str, Any], tensors: list[TensorInfo], family: Family
) -> ModelInfo:
    experts = _num_experts(config, family, tensors)
    layers = need(config, "num_hidden_layers")
    return ModelInfo(
        source=source,
        path=str(found.path),
        architecture=config["architectures"][0],
        model_type=config.get("model_type", ""),
        family=family,
        config=config,
        tensors=tuple(tensors),
        linears=linears_of(family, tensors, layers),
        attention=attention_of(config),
        num_experts=experts,
        num_experts_per_tok=need(config, "num_experts_per_tok", "moe_k", "moe_topk") if experts else 0,
        dtype=main_dtype(tensors),
        has_weights=found.tensors is not None,
        has_tokenizer=any(name in found.files for name in _TOKENIZER_FILES),
        chat_template=_has_chat_template(found.path),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        hidden_size=need(config, "hidden_size"),
        vocab_size=need(config, "vocab_size"),
        max_position_embeddings=need(config, "max_position_embeddings"),
    )


def _num_experts(config: dict[str, Any], family: Family, tensors: Iterable[TensorInfo]) -> int:
    if family.num_experts_key is None:
        return 0
    # transformers 5 writes num_local_experts where the hub has num_experts.
    keys = (family.num_experts_key, *EXPERT_COUNT_KEYS)
    if any(config.get(key) for key in keys):
        return need(config, *keys)
    seen = {family.classify(tensor.name).expert for tensor in tensors} - {None}
    return len(seen) or need(config, *keys)


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    tokenizer = path / "tokenizer_config.json"
    return tokenizer.is_file() and bool(read_json(tokenizer).get("chat_template"))
