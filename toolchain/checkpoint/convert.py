"""compressed-tensors -> ModelOpt's unified layout: the same codes and scales under the names that runtimes ask for.

Nothing is quantized again. What must change is told: a reciprocal of NVFP4's ``*_global_scale`` is rounded in float32,
once; runtimes that read compressed-tensors take the same reciprocal. Everything else is copied or widened.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.checkpoint.audit import Verdict, audit
from toolchain.checkpoint.compressed import RECIPROCAL, CompressedReader, is_compressed
from toolchain.checkpoint.quant_config import (
    FILE,
    MIXED,
    TIED_HEAD,
    QuantConfig,
    algo_per_module,
    render_flat,
    render_legacy,
    summarize_excluded,
)
from toolchain.checkpoint.writer import write_shards
from toolchain.core.errors import FindingsError, ToolchainError, UsageError
from toolchain.core.files import (
    atomic_directory,
    atomic_write_json,
    refuse_to_replace_source,
    require_free_bytes,
)
from toolchain.core.progress import Progress, Silent
from toolchain.core.roles import Role
from toolchain.formats import format_of_algo
from toolchain.models.config import read_config

if TYPE_CHECKING:
    import torch

RECORD = "conversion.json"
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
NOT_COPIED = ("config.json", FILE, "model.safetensors.index.json", "recipe.yaml")
E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """How the decoded values of the converted matrices compare with those that compressed-tensors decodes."""

    matrices: int = 0
    """Quantized matrices."""
    exact: int = 0
    """Those whose every value is the same float32."""
    same_bf16: int = 0
    """Those whose every value is the same after rounding to BF16, the dtype that most models compute in."""
    largest_difference: float = 0.0
    """Largest relative difference of a decoded value; float32 itself resolves 6e-8."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    exactness: Exactness
    verdict: Verdict
    """Of the converted checkpoint; of the source, seen in the new layout, when nothing was written."""
    quant_algo: str

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_algo": self.quant_algo,
            "exactness": asdict(self.exactness),
            "verdict": self.verdict.to_json(),
        }


def convert(
    directory: Path,
    output: Path,
    *,
    exact: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write ``directory`` in ModelOpt's layout to ``output``; with ``dry_run`` only look.

    UsageError TC-342 for a checkpoint that is not compressed-tensors; ToolchainError TC-341 for a scheme without a
    counterpart and, with ``exact``, TC-342 when some decoded value would differ in BF16; FindingsError TC-402 when the
    source is broken. Nothing is left behind by a failure.
    """
    progress = progress or Silent()
    config = read_config(directory)
    if not is_compressed(config):
        raise UsageError(
            f"{directory} is not stored by compressed-tensors (quant_method "
            f"{(config.get('quantization_config') or {}).get('quant_method')!r})",
            hint="`toolchain verify` says what it is",
            code="TC-342",
        )
    reader = CompressedReader(directory, config)
    exactness = measure(reader)
    if exact and exactness.same_bf16 < exactness.matrices:
        raise ToolchainError(
            f"{exactness.matrices - exactness.same_bf16} of {exactness.matrices} matrices would decode to other BF16 "
            f"values (largest relative difference {exactness.largest_difference:.1e})",
            hint="without --exact they are converted all the same",
            code="TC-342",
        )
    if dry_run:
        verdict = _require_sound(audit(directory, progress=progress), directory)
        return Conversion(exactness=exactness, verdict=verdict, quant_algo=str(reader.quant.quant_algo))
    refuse_to_replace_source(output, directory)
    require_free_bytes(output, sum(info.bytes for info in reader.infos.values()), what="the conversion")
    _require_sound(audit(directory, progress=progress), directory)
    with atomic_directory(output, force=force) as partial:
        write_shards(partial, _tensors(reader, progress))
        _write_configs(partial, reader)
        _copy_side_files(directory, partial)
        found = {"source": str(directory.resolve()), "layout": "compressed-tensors", **asdict(exactness)}
        atomic_write_json(partial / RECORD, found)
        verdict = _require_sound(audit(partial, progress=progress), output)
    return Conversion(exactness=exactness, verdict=verdict, quant_algo=str(reader.quant.quant_algo))


def _require_sound(verdict: Verdict, directory: Path) -> Verdict:
    if not verdict.passed:
        raise FindingsError(
            f"{directory} fails its audit: nothing was converted",
            verdict.findings,
            hint="`toolchain explain CODE` tells more about each finding",
            code="TC-402",
        )
    return verdict


def _tensors(reader: CompressedReader, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    for name in progress.track(reader.infos, description="convert", total=len(reader.infos)):
        yield name, reader.get(name)


def _write_configs(directory: Path, reader: CompressedReader) -> None:
    """The shape that every release reads: legacy in a file of its own, flat in config.json."""
    quant, family = reader.quant, reader.family
    taken = {name: quant.algo_of(name) or "" for name in _matrices(reader, quantized=True)}
    formats = {name: found for name, algo in taken.items() if (found := format_of_algo(algo))}
    mixed = quant.quant_algo == MIXED
    legacy = render_legacy(
        QuantConfig(
            quant_algo=quant.quant_algo,
            kv_cache_quant_algo=quant.kv_cache_quant_algo,
            quantized_layers=algo_per_module(formats, family) if mixed else {},
            exclude_modules=summarize_excluded(_excluded(reader), taken),
            producer_version=version("nvidia-modelopt"),
        )
    )
    atomic_write_json(directory / FILE, legacy)
    config = {**reader.config, "quantization_config": render_flat(legacy)}
    atomic_write_json(directory / "config.json", config)


def _excluded(reader: CompressedReader) -> list[str]:
    """Plain matrices, and the head of tied embeddings, which has no tensor but is built by runtimes."""
    plain = [
        name
        for name in _matrices(reader, quantized=False)
        if reader.family.classify(name).role is not Role.NORM
    ]
    tied = reader.config.get("tie_word_embeddings") and TIED_HEAD not in plain
    return [*plain, TIED_HEAD] if tied else plain


def _matrices(reader: CompressedReader, *, quantized: bool) -> Iterator[str]:
    for name, info in reader.infos.items():
        module, suffix = reader.family.split(name)
        if suffix == "weight" and len(info.shape) >= 2:
            has_scale = any(
                f"{module}.{item}" in reader.infos for item in ("weight_scale", "weight_scale_inv")
            )
            if has_scale is quantized:
                yield module


def _copy_side_files(source: Path, directory: Path) -> None:
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in NOT_COPIED:
                shutil.copyfile(path, directory / path.name)


def measure(reader: CompressedReader) -> Exactness:
    """Compare what both layouts decode to, over every number that a matrix's scales and codes can make."""
    matrices = list(_matrices(reader, quantized=True))
    found = [_difference(reader, name) for name in matrices]
    return Exactness(
        matrices=len(matrices),
        exact=sum(largest == 0 for largest, _ in found),
        same_bf16=sum(same for _, same in found),
        largest_difference=max((largest for largest, _ in found), default=0.0),
    )


def _difference(reader: CompressedReader, module: str) -> tuple[float, bool]:
    """(largest relative difference, equal in BF16) of one matrix; formats without a reciprocal are copied exactly.

    E4M3 has 126 positive scales, E2M1 seven magnitudes: all their products are looked at, in place of all weights.
    """
    import torch

    scale_2 = f"{module}.weight_scale_2"
    if scale_2 not in reader.infos or not reader.origin(scale_2).endswith(RECIPROCAL):
        return 0.0, True
    stored = reader.stored[reader.origin(scale_2)]
    divisor = reader.read_stored(stored.name).float().reshape(())
    used = reader.get(f"{module}.weight_scale").flatten().view(torch.uint8).unique()
    scales = used.view(torch.float8_e4m3fn).float().unsqueeze(1)
    codes = torch.tensor(E2M1)
    theirs, ours = codes * (scales / divisor), codes * (scales * reader.get(scale_2))
    relative = ((ours - theirs).abs() / theirs).nan_to_num(nan=0.0)
    return float(relative.max()), bool(torch.equal(ours.bfloat16(), theirs.bfloat16()))
