"""Evaluation of directories: what the command line and the pipeline call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.files import read_json
from toolchain.core.findings import Finding
from toolchain.core.progress import Progress, Silent
from toolchain.data.overlap import shared_fraction
from toolchain.data.texts import read_texts
from toolchain.data.tokenizer import load_tokenizer
from toolchain.evaluate.compare import Metrics, compare_models
from toolchain.evaluate.perplexity import perplexity
from toolchain.evaluate.tokens import begin_token, encode_samples, token_hash
from toolchain.runtime.location import locate
from toolchain.runtime.model import load_model, resolve_device

MOST_OVERLAP = 0.05
"""Boilerplate, such as licence headers, recurs in any two texts of a kind."""


def evaluate_checkpoint(
    directory: Path,
    *,
    baseline: Path | None,
    data: Path,
    max_tokens: int,
    window: int = 512,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the bytes of ``directory`` (engine or checkpoint) on ``data`` and return a JSON-able report.

    With ``baseline`` (the model it was made of) the report has all of ``Metrics``, else ``ppl`` and
    ``tokens``. ``data`` says what was measured on, with a hash of the tokens: two reports compare only when
    it is equal.
    """
    checkpoint = locate(directory).checkpoint
    tokenizer = load_tokenizer(checkpoint)
    tokens = encode_samples(tokenizer, read_texts(data), max_tokens=max_tokens, window=window)
    bos = begin_token(tokenizer)
    overlap = calibration_overlap(checkpoint, tokens, progress or Silent())
    report: dict[str, Any] = {"checkpoint": str(directory), "baseline": baseline and str(baseline)}
    if baseline is None:
        model = _load(checkpoint, device, progress)
        figures = perplexity(model, tokens, window=window, bos=bos, progress=progress)
        report |= {"tokens": figures["tokens"], "ppl": figures["ppl"]}
    else:
        metrics = compare(
            checkpoint, baseline, tokens, window=window, bos=bos, device=device, progress=progress
        )
        report |= metrics.to_json()
    report["data"] = {
        "source": str(data),
        "tokens": len(tokens),
        "token_hash": token_hash(tokens),
        "window": window,
        "bos": bos is not None,
        "calibration_overlap": overlap,
    }
    return report


def calibration_overlap(checkpoint: Path, tokens: Sequence[int], progress: Progress) -> float | None:
    """Share of ``tokens`` that the checkpoint was calibrated on, 0 to 1; None where its manifest does not tell.

    More than ``MOST_OVERLAP`` is said as a warning (TC-525): such figures flatter the checkpoint.
    """
    manifest = checkpoint / "quantize.json"
    kept = read_json(manifest).get("calibration_sketch") if manifest.is_file() else None
    share = shared_fraction(kept, tokens) if kept else None
    if share is not None and share > MOST_OVERLAP:
        finding = Finding(
            code="TC-525",
            where=str(checkpoint),
            message=f"about {share:.0%} of the evaluation text was calibrated on",
            hint="judge it on other text",
            severity="warning",
        )
        progress.note(str(finding))
    return share


def compare(
    checkpoint: Path,
    baseline: Path,
    data: Path | Sequence[int],
    *,
    max_tokens: int | None = None,
    window: int = 512,
    bos: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Metrics:
    """Metrics of two directories on a path of texts or on token ids. Both models are loaded at the same time.

    With a path, ``bos`` is what the tokenizer says; with token ids it is taken as given.
    """
    checkpoint, baseline = locate(checkpoint).checkpoint, locate(baseline).checkpoint
    tokenizer = load_tokenizer(checkpoint)
    _refuse_other_vocabulary(tokenizer, baseline)
    if isinstance(data, Path):
        tokens = encode_samples(tokenizer, read_texts(data), max_tokens=max_tokens or 2**31, window=window)
        bos = begin_token(tokenizer)
    else:
        tokens = list(data)[:max_tokens]
    model, reference = _load(checkpoint, device, progress), _load(baseline, device, progress)
    return compare_models(model, reference, tokens, window=window, bos=bos, progress=progress)


def _load(checkpoint: Path, device: str, progress: Progress | None) -> Any:
    (progress or Silent()).note(f"loading {checkpoint}")
    return load_model(checkpoint, device=resolve_device(device), dtype=None, emulate_activations=True)


def _refuse_other_vocabulary(tokenizer: Any, baseline: Path) -> None:
    if load_tokenizer(baseline).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"the tokenizer of {baseline} has another vocabulary",
            hint="give the baseline that the checkpoint was made of",
            code="TC-522",
        )
