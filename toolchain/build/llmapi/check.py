"""Arguments of the LLM API against the record of a release: unknown keys, wrong types, words that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.build.llmapi.records import ROOT, Record, find_record, is_newer, read_records
from toolchain.build.llmapi.types import ATOMS, Type
from toolchain.core.errors import FindingsError
from toolchain.core.findings import Finding, errors

UNKNOWN, WRONG, UNRECORDED = "TC-404", "TC-405", "TC-406"
FEW = 20
"""Keys of a class that are all named where none is near."""
ELSEWHERE = {
    "build_config": "the PyTorch backend refuses build_config; its limits stand at the top level, as max_batch_size, "
    "max_num_tokens and max_seq_len",
    "quant_config": "the PyTorch backend reads the quantization from the checkpoint",
    "calib_config": "the PyTorch backend calibrates nothing",
    "kv_cache_dtype": "it is kv_cache_config.dtype",
    "free_gpu_memory_fraction": "it is kv_cache_config.free_gpu_memory_fraction",
    "enable_block_reuse": "it is kv_cache_config.enable_block_reuse",
    "moe_backend": "it is moe_config.backend",
    "use_cuda_graph": "it is cuda_graph_config (null for none)",
    "ep_size": "it is moe_expert_parallel_size",
    "tp_size": "it is tensor_parallel_size",
    "pp_size": "it is pipeline_parallel_size",
}
"""What people write at the top level and where it belongs."""


def argument_findings(arguments: Mapping[str, Any], version: str, *, where: str) -> list[Finding]:
    """Everything that TensorRT-LLM ``version`` would refuse of ``arguments``, and a warning where nobody has looked.

    ``where``: the file or option they stand in.
    """
    record = find_record(version)
    findings = list(_Check(record=record, version=version, where=where).all(arguments))
    if version not in record.releases:
        message = f"the arguments of TensorRT-LLM {version} are checked as those of {record.read_from}"
        hint = (
            "its own sources could not be read; `toolchain build --warmup` tries them where it is installed"
        )
        findings.append(Finding(code=UNRECORDED, where=where, message=message, hint=hint, severity="warning"))
    return findings


def require_arguments(arguments: Mapping[str, Any], version: str, *, where: str) -> list[Finding]:
    """The warnings. FindingsError TC-404 with all findings when one is an error."""
    findings = argument_findings(arguments, version, where=where)
    if errors(findings):
        raise FindingsError(
            f"TensorRT-LLM {version} does not take these arguments",
            findings,
            hint=f"recorded from: {find_record(version).source}",
            code=UNKNOWN,
        )
    return findings


@dataclass(frozen=True, kw_only=True)
class _Check:
    record: Record
    version: str
    where: str

    def all(self, arguments: Mapping[str, Any]) -> Iterator[Finding]:
        yield from self._class(ROOT, arguments, "")

    def _class(self, name: str, value: Mapping[str, Any], path: str, *, extra: str = "") -> Iterator[Finding]:
        known = self.record.classes[name]
        for key, item in value.items():
            place = f"{path}.{key}" if path else str(key)
            if key in known:
                yield from self._value(known[key].type, item, place)
            elif key != extra:
                yield self._unknown(name, str(key), place)

    def _unknown(self, name: str, key: str, place: str) -> Finding:
        known = self.record.classes[name]
        if "." not in place and key in ELSEWHERE:
            hint, unsure = ELSEWHERE[key], False
        else:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
            having = [item.since for item in read_records() if key in item.classes.get(name, {})]
            said = [f"recorded for {', '.join(having)}"] * bool(having) + [
                f"nearest: {' or '.join(near)}"
            ] * bool(near)
            hint = "; ".join(said) or _few(known)
            # Where a class was not read in this very release, a key that others have may be there all the same.
            slip = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
            unsure = bool(having and not self.record.known(name)) or (is_newer(self.version) and not slip)
        return Finding(
            code=UNKNOWN,
            where=f"{self.where}: {place}",
            message=f"{name} of TensorRT-LLM {self.version} has no {key}{', as far as is known' * unsure}",
            hint=hint,
            severity="warning" if unsure else "error",
        )

    def _value(self, kind: Type, value: Any, place: str) -> Iterator[Finding]:
        if kind.name == "union":
            yield from self._any_of(kind, value, place)
        elif kind.name in self.record.unions:
            yield from self._tagged(kind.name, value, place)
        elif kind.name in self.record.classes:
            yield from (
                self._class(kind.name, value, place)
                if isinstance(value, Mapping)
                else [self._wrong(kind, value, place)]
            )
        elif kind.name == "list" and isinstance(value, list | tuple | set):
            for index, item in enumerate(value):
                yield from self._value(kind.parts[0], item, f"{place}[{index}]")
        elif kind.name == "dict" and isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._value(kind.parts[0], _key(kind.parts[0], key), f"{place} key {key}")
                yield from self._value(kind.parts[1], item, f"{place}.{key}")
        elif kind.name == "words" and isinstance(value, str) and value in kind.words:
            return
        elif not ATOMS.get(kind.name, lambda _: False)(value):
            yield self._wrong(kind, value, place)

    def _any_of(self, kind: Type, value: Any, place: str) -> Iterator[Finding]:
        """Nothing when one member fits; the problems within a mapping that can only be one of them."""
        tried = [(member, list(self._value(member, value, place))) for member in kind.parts]
        if any(not errors(found) for _, found in tried):
            yield from next(found for _, found in tried if not errors(found))
            return
        within = [found for member, found in tried if isinstance(value, Mapping) and self._holds(member)]
        if len(within) == 1:
            yield from within[0]
        elif len(kind.parts) == 2 and kind.parts[1].name == "null" and value is not None:
            yield from tried[0][1]
        else:
            yield self._wrong(kind, value, place)

    def _holds(self, member: Type) -> bool:
        return member.name in self.record.classes or member.name in self.record.unions

    def _tagged(self, name: str, value: Any, place: str) -> Iterator[Finding]:
        union = self.record.unions[name]
        allowed = Type(name="words", words=tuple(union.classes))
        if not isinstance(value, Mapping) or union.by not in value:
            yield self._wrong(Type(name=f"{name} with {union.by}"), value, place)
            return
        tag = value[union.by]
        if not isinstance(tag, str) or tag not in union.classes:
            yield self._wrong(allowed, tag, f"{place}.{union.by}")
        elif union.classes[tag] != "any":
            yield from self._class(union.classes[tag], value, place, extra=union.by)

    def _wrong(self, kind: Type, value: Any, place: str) -> Finding:
        text = repr(value)
        said = text if len(text) <= 80 else f"{text[:77]}..."
        return Finding(
            code=WRONG,
            where=f"{self.where}: {place}",
            message=f"is {said}, TensorRT-LLM {self.version} expects {kind}",
            hint=_nearest_word(kind, value),
            # A later line may have words, such as backends, that nobody has recorded yet.
            severity="warning" if kind.name == "words" and is_newer(self.version) else "error",
        )


def _nearest_word(kind: Type, value: Any) -> str:
    """Capitals and underscores are the usual mistake: ``eagle_3`` for ``Eagle3``."""
    kinds = (kind, *kind.parts) if kind.name == "union" else (kind,)
    folded = {word.lower().replace("_", ""): word for item in kinds for word in item.words}
    if not folded or not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value.lower().replace("_", ""), folded, n=1, cutoff=0.6)
    return f"nearest: {folded[near[0]]}" if near else ""


def _few(known: Mapping[str, Any]) -> str:
    return f"it has {', '.join(sorted(known))}" if len(known) <= FEW else ""


def _key(kind: Type, key: Any) -> Any:
    """Keys of JSON are text, also where the mapping is keyed by numbers."""
    return int(key) if kind.name == "int" and isinstance(key, str) and key.isdigit() else key
