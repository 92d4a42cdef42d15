"""Rules on the quantization config: it says exactly what the bytes are, in both of its places."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.checkpoint.audit.subject import KV_SUFFIXES, Subject
from toolchain.checkpoint.quant_config import FILE, MIXED, TIED_HEAD, matches, parse_quant_config
from toolchain.core.findings import Finding
from toolchain.core.roles import Role
from toolchain.models.config import text_config


def exclude_list(subject: Subject) -> Iterator[Finding]:
    """The excluded modules are exactly the unquantized matrices."""
    quant = subject.quant
    if quant.quant_algo == MIXED:
        yield from _mixed(subject)
        return
    for module in subject.quantized:
        if subject.excludes(module):
            yield Finding(code="TC-315", where=module, message="is quantized, but exclude_modules names it")
    for module in subject.plain:
        part = subject.part(module)
        if not subject.excludes(module) and part.role is not Role.NORM:
            yield Finding(
                code="TC-316",
                where=module,
                message=f"keeps {subject.modules[module]['weight'].dtype}, but exclude_modules does not name it",
                hint="runtimes would read these bytes as quantized",
            )
    tied = (TIED_HEAD,) if text_config(subject.config).get("tie_word_embeddings") else ()
    plain = [name for module in subject.plain for name in subject.excluded_as(module)]
    for pattern in quant.exclude_modules:
        if not any(matches((pattern,), module) for module in (*plain, *tied)):
            yield Finding(
                code="TC-317",
                where=f"{FILE}: {pattern}",
                message="excludes no module of this checkpoint",
                hint="a wrong prefix here leaves the real module to be read as quantized",
            )


def _mixed(subject: Subject) -> Iterator[Finding]:
    listed = set(subject.quant.quantized_layers)
    for module in sorted(set(subject.quantized) - listed):
        yield Finding(
            code="TC-316", where=module, message="is quantized, but quantized_layers does not name it"
        )
    for module in sorted(listed - set(subject.quantized)):
        yield Finding(
            code="TC-315", where=module, message="quantized_layers names it, but its bytes are not quantized"
        )


def both_places_agree(subject: Subject) -> Iterator[Finding]:
    """hf_quant_config.json is authoritative; the copy in config.json must say the same."""
    inline = subject.config.get("quantization_config")
    if not (subject.directory / FILE).is_file():
        return
    if not isinstance(inline, dict):
        yield Finding(
            code="TC-323",
            where="config.json",
            message=f"has no quantization_config, {FILE} says {subject.quant.quant_algo}",
        )
        return
    other = parse_quant_config(inline, "config.json: quantization_config")
    for name in ("quant_algo", "kv_cache_quant_algo"):
        ours, theirs = getattr(subject.quant, name), getattr(other, name)
        if ours != theirs:
            yield Finding(
                code="TC-323", where="config.json", message=f"{name} is {theirs}, {FILE} says {ours}"
            )
    if set(other.exclude_modules) != set(subject.quant.exclude_modules):
        different = sorted(set(other.exclude_modules) ^ set(subject.quant.exclude_modules))
        yield Finding(
            code="TC-323",
            where="config.json",
            message=f"`ignore` differs from exclude_modules: {different[:4]}",
        )


def kv_cache(subject: Subject) -> Iterator[Finding]:
    """k_scale and v_scale: both or neither in a layer, in all layers or none, and only with a KV algorithm."""
    holders: dict[str, set[str]] = {}
    for module, tensors in subject.modules.items():
        for suffix in KV_SUFFIXES:
            if suffix in tensors:
                holders.setdefault(module.rpartition(".")[0], set()).add(suffix)
    for parent, present in holders.items():
        if len(present) == 1:
            yield Finding(
                code="TC-324", where=parent, message=f"has only {present.pop()}, expected k_scale and v_scale"
            )
    algo = subject.quant.kv_cache_quant_algo
    if holders and algo is None:
        yield Finding(
            code="TC-324",
            where=FILE,
            message="the checkpoint holds KV cache scales, kv_cache_quant_algo is null",
        )
    if algo == "FP8" and 0 < len(holders) < subject.num_layers:
        yield Finding(
            code="TC-324",
            where=FILE,
            message=f"{len(holders)} of {subject.num_layers} layers have KV cache scales",
        )
    if algo == "FP8" and not holders:
        yield Finding(
            code="TC-324", where=FILE, severity="warning", message="no KV cache scales: runtimes will use 1.0"
        )
