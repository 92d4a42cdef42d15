"""Rules on names, dtypes and shapes: what each algorithm must store, and nothing else. Headers only."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.checkpoint.audit.subject import KV_SUFFIXES, Subject
from toolchain.core.errors import ToolchainError
from toolchain.core.findings import Finding
from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.families.lookup import EXPERT_COUNT_KEYS
from toolchain.formats.base import Format

MODEL_DTYPES = ("BF16", "F16", "F32")


def stored_tensors(subject: Subject) -> Iterator[Finding]:
    """Every quantized module has the tensors of its algorithm, with their dtypes and shapes, and no others."""
    for module in subject.quantized:
        found = subject.format_of(module)
        if found is None:
            algo = subject.quantized[module]
            yield Finding(
                code="TC-301", where=module, message=f"unknown quant_algo {algo!r}", hint="list formats"
            )
            continue
        yield from _module_tensors(subject, module, found)


def _module_tensors(subject: Subject, module: str, found: Format) -> Iterator[Finding]:
    tensors = subject.modules[module]
    shape = subject.weight_shape(module)
    for item in found.stored:
        info = subject.stored(module, item)
        where = f"{module}.{item.suffix}"
        if info is None:
            if item.required:
                yield Finding(code="TC-310", where=where, message=f"missing; {found.quant_algo} stores it")
            continue
        allowed = MODEL_DTYPES if item.dtype == "source" else (item.dtype,)
        if info.dtype not in allowed:
            yield Finding(
                code="TC-311", where=where, message=f"dtype {info.dtype}, expected {' or '.join(allowed)}"
            )
        if shape is None:
            yield Finding(code="TC-312", where=where, message=f"shape {info.shape} is not that of a matrix")
        elif not _is_shape(actual := subject.own_shape(module, info), expected := item.shape(*shape)):
            yield Finding(code="TC-312", where=where, message=f"shape {actual}, expected {expected}")
    if shape is not None and shape[1] % found.in_multiple:
        message = f"in_features {shape[1]} is not a multiple of {found.in_multiple}"
        yield Finding(code="TC-312", where=f"{module}.weight", message=message)
    known = {name for item in found.stored for name in (item.suffix, *item.aliases)} | {"bias", *KV_SUFFIXES}
    for suffix in sorted(set(tensors) - known):
        yield Finding(
            code="TC-313", where=f"{module}.{suffix}", message=f"{found.quant_algo} stores no such tensor"
        )


def _is_shape(actual: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal, but for a scalar of shape [1], and the [rows, 1, columns, 1] in which ModelOpt stores scales of blocks."""
    if len(actual) == 4 and actual[1::2] == (1, 1):
        actual = actual[::2]
    return actual == expected or (expected == () and actual == (1,))


def leaked_scales(subject: Subject) -> Iterator[Finding]:
    """Scales whose module has no quantized weight: left over, or the weight went missing."""
    for module, tensors in subject.modules.items():
        if module in subject.quantized:
            continue
        for suffix in sorted(tensors):
            if suffix.endswith(("_scale", "_scale_2", "_scale_inv", "_amax")) and suffix not in KV_SUFFIXES:
                yield Finding(
                    code="TC-313", where=f"{module}.{suffix}", message="a scale beside no quantized weight"
                )
        weight = tensors.get("weight")
        if weight is not None and weight.dtype not in (*MODEL_DTYPES, "I64"):
            yield Finding(
                code="TC-310",
                where=f"{module}.weight",
                message=f"dtype {weight.dtype} but no weight_scale beside it",
            )


def inventory(subject: Subject) -> Iterator[Finding]:
    """Against the architecture that config.json describes: nothing missing, nothing foreign, every shape right."""
    from toolchain.models.meta import meta_tensors

    try:
        expected = {info.name: info for info in meta_tensors(str(subject.directory), subject.config)}
    except ToolchainError as error:
        yield Finding(
            code="TC-320", where="config.json", message=str(error), severity="warning", hint=error.hint
        )
        yield from _experts_by_count(subject)
        return
    for name, info in expected.items():
        module, suffix = subject.family.split(name)
        stored = subject.modules.get(module, {}).get(suffix)
        if stored is None:
            role = subject.part(name).role
            code = "TC-318" if role is Role.ROUTED_EXPERT else "TC-319"
            yield Finding(code=code, where=name, message=f"missing; config.json describes it as {info.shape}")
            continue
        actual = stored.shape
        if suffix == "weight" and module in subject.quantized:
            actual = _model_shape(subject, module) or actual
        if actual != info.shape:
            yield Finding(code="TC-312", where=name, message=f"describes {actual}, config.json {info.shape}")
    described = {subject.family.split(name)[0] for name in expected}
    for module in subject.quantized:
        if module not in described and subject.part(module).role is not Role.OTHER:
            yield Finding(
                code="TC-319", where=f"{module}.weight", message="config.json describes no such module"
            )


def _model_shape(subject: Subject, module: str) -> tuple[int, ...] | None:
    """Shape that the model has for the weight of a quantized module: fused experts are [E, in, out] there."""
    shape = subject.weight_shape(module)
    if shape is None or not subject.family.is_fused(module):
        return shape
    return (subject.copies(module), *shape[::-1])


def _experts_by_count(subject: Subject) -> Iterator[Finding]:
    """When transformers cannot build the model: every layer that has experts has all of them, with all projections."""
    config = subject.config.get("text_config") or subject.config
    count = next((int(config[key]) for key in EXPERT_COUNT_KEYS if key in config), 0)
    seen: dict[int, set[tuple[int, str]]] = {}
    for module in subject.modules:
        part = subject.part(module)
        if part.role is Role.ROUTED_EXPERT and part.expert is not None:
            seen.setdefault(part.layer, set()).add((part.expert, part.projection))
    for layer, present in sorted(seen.items()):
        for expert in range(count):
            for projection in subject.family.gate_up_down:
                if (expert, projection) not in present:
                    where = f"layer {layer} expert {expert} {projection}"
                    yield Finding(
                        code="TC-318", where=where, message=f"missing; config.json says {count} experts"
                    )


def roles(subject: Subject) -> Iterator[Finding]:
    """Routers, norms and embeddings are never quantized, lm_head only where the config says so; of a layer's routed
    experts all are, or none."""
    layers: dict[int | None, dict[bool, list[str]]] = {}
    for module in (*subject.quantized, *subject.plain):
        part = subject.part(module)
        is_quantized = module in subject.quantized
        asked = part.role is Role.LM_HEAD and subject.quant.algo_of(module) is not None
        if is_quantized and part.role not in QUANTIZABLE and not asked:
            yield Finding(
                code="TC-321",
                where=module,
                message=f"is a {part.role.value} and is stored as {subject.quantized[module]}",
                hint="this part must keep its dtype: quantize again",
            )
        if part.role is Role.ROUTED_EXPERT:
            layers.setdefault(part.layer, {True: [], False: []})[is_quantized].append(module)
    for layer, split in sorted(layers.items(), key=lambda item: item[0] or 0):
        if split[True] and split[False]:
            yield Finding(
                code="TC-322",
                where=f"layer {layer}",
                message=f"{len(split[False])} of {len(split[True]) + len(split[False])} expert matrices are not "
                f"quantized, e.g. {split[False][0]}",
                hint="runtimes need one format for all experts of a layer",
            )
        algos = {subject.quantized[module] for module in split[True]}
        if len(algos) > 1:
            yield Finding(
                code="TC-322", where=f"layer {layer}", message=f"experts in several formats: {sorted(algos)}"
            )
