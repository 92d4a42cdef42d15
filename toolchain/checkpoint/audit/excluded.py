"""Rules on the quantization config: it says exactly what the bytes are, in both of its places."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.checkpoint.audit.layout import MODEL_DTYPES
from toolchain.checkpoint.audit.subject import KV_SUFFIXES, Subject
from toolchain.checkpoint.quant_config import FILE, MIXED, TIED_HEAD, matches, parse_quant_config
from toolchain.core.findings import Finding
from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.models.config import text_config
from toolchain.models.types import TensorInfo


def exclude_list(subject: Subject) -> Iterator[Finding]:
    """The excluded modules are exactly the unquantized matrices."""
    quant = subject.quant
    mixed = quant.quant_algo == MIXED
    if mixed:
        yield from _mixed(subject)
    for module in subject.quantized:
        if subject.excludes(module):
            yield Finding(code="TC-315", where=module, message="is quantized, but exclude_modules names it")
    for module in subject.plain:
        part = subject.part(module)
        # Where layers are named one by one, what is not named is not quantized, excluded or not.
        if not mixed and not subject.excludes(module) and part.role is not Role.NORM:
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
    """quantized_layers names exactly the quantized modules, perhaps with the parent of a layer's experts."""
    listed = subject.quant.quantized_layers
    for module in sorted(set(subject.quantized) - set(listed)):
        if not any(name in listed for name in subject.excluded_as(module)):
            yield Finding(
                code="TC-315", where=module, message="is quantized, but quantized_layers does not name it"
            )
    inside: dict[str, set[str]] = {}
    for module, algo in subject.quantized.items():
        head, found, _ = module.partition(".experts.")
        if found:
            inside.setdefault(f"{head}.experts", set()).add(algo)
    for module in sorted(set(listed) - set(subject.quantized)):
        if inside.get(module) == {listed[module]}:
            continue
        known = (
            "its bytes are not quantized"
            if module in subject.modules
            else "the checkpoint has no such module"
        )
        if module in inside:
            known = f"its experts are stored as {', '.join(sorted(inside[module]))}"
        yield Finding(
            code="TC-315",
            where=f"{FILE}: {module}",
            message=f"quantized_layers calls it {listed[module]}, but {known}",
            hint="a wrong prefix here leaves the real module to be read as unquantized",
        )
    yield from _fused_matmuls(subject)


def _fused_matmuls(subject: Subject) -> Iterator[Finding]:
    """Runtimes ask for the format of q_proj and gate_proj, and take it for their siblings."""
    groups: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for module in (*subject.quantized, *subject.plain):
        part = subject.part(module)
        parent, _, projection = module.rpartition(".")
        siblings = subject.family.fused_siblings(projection)
        if part.role in QUANTIZABLE and len(siblings) > 1:
            groups.setdefault((parent, siblings), {})[projection] = subject.quantized.get(
                module, "unquantized"
            )
    for (parent, _), algos in groups.items():
        if len(set(algos.values())) > 1:
            listed = ", ".join(f"{name} {algo}" for name, algo in algos.items())
            yield Finding(
                code="TC-335",
                where=parent,
                message=f"runtimes run these as one matmul: {listed}",
                hint="quantize again with one format for all of them",
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
    for name in ("quant_algo", "kv_cache_quant_algo", "group_size"):
        ours, theirs = getattr(subject.quant, name), getattr(other, name)
        # The flat shape has its group size inside config_groups, and not always here.
        if ours != theirs and not (name == "group_size" and theirs is None):
            yield Finding(
                code="TC-323", where="config.json", message=f"{name} is {theirs}, {FILE} says {ours}"
            )
    if other.quantized_layers != subject.quant.quantized_layers:
        ours, theirs = subject.quant.quantized_layers, other.quantized_layers
        names = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        yield Finding(
            code="TC-323",
            where="config.json",
            message=f"quantized_layers differs for {len(names)} modules: {names[:4]}",
        )
    if set(other.exclude_modules) != set(subject.quant.exclude_modules):
        different = sorted(set(other.exclude_modules) ^ set(subject.quant.exclude_modules))
        yield Finding(
            code="TC-323",
            where="config.json",
            message=f"`ignore` differs from exclude_modules: {different[:4]}",
        )


def _kv_scalar(where: str, info: TensorInfo) -> Iterator[Finding]:
    """One floating number for all heads of a layer."""
    if info.parameters != 1:
        message = f"shape {info.shape}, expected one number per layer"
        yield Finding(code="TC-312", where=where, message=message)
    if info.dtype not in MODEL_DTYPES:
        yield Finding(code="TC-311", where=where, message=f"dtype {info.dtype}, expected F32")


def group_size(subject: Subject) -> Iterator[Finding]:
    """The config's group_size is that of the stored scales: loaders allocate by the first and read the second."""
    said = subject.quant.group_size
    for found in subject.formats:
        if (
            said is not None
            and subject.quant.quant_algo == found.quant_algo
            and found.group_size not in (None, said)
        ):
            yield Finding(
                code="TC-340",
                where=FILE if (subject.directory / FILE).is_file() else "config.json",
                message=f"group_size is {said}, {found.quant_algo} is stored in groups of {found.group_size}",
            )


def kv_cache(subject: Subject) -> Iterator[Finding]:
    """k_scale and v_scale: both or neither in a layer, in all layers or none, and only with a KV algorithm."""
    holders: dict[str, set[str]] = {}
    for module, tensors in subject.modules.items():
        for suffix in KV_SUFFIXES:
            if suffix in tensors:
                holders.setdefault(module.rpartition(".")[0], set()).add(suffix)
                yield from _kv_scalar(f"{module}.{suffix}", tensors[suffix])
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
    if algo in ("FP8", "NVFP4") and 0 < len(holders) < subject.num_layers:
        yield Finding(
            code="TC-324",
            where=FILE,
            message=f"{len(holders)} of {subject.num_layers} layers have KV cache scales",
        )
    if algo == "FP8" and not holders:
        yield Finding(
            code="TC-324", where=FILE, severity="warning", message="no KV cache scales: runtimes will use 1.0"
        )
    if algo == "NVFP4" and not holders:
        yield Finding(
            code="TC-324", where=FILE, message="no KV cache scales: a scale of 1.0 clips NVFP4 at 6 * 448"
        )
