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
from toolchain.data.tokenizer import load_tokenizer
from toolchain.evaluate.compare import Metrics, compare_models
from toolchain.evaluate.run import Run, run_evaluation
from toolchain.evaluate.tokens import begin_token, encode_sources
from toolchain.runtime.location import locate
from toolchain.runtime.model import load_model, resolve_device

SCHEMA_VERSION = 2
MOST_OVERLAP = 0.05
"""Boilerplate, such as licence headers, recurs in any two texts of a kind."""
Data = Path | str | Sequence[Path | str]


def evaluate_checkpoint(
    directory: Path,
    *,
    baseline: Path | None,
    data: Data,
    max_tokens: int,
    window: int = 512,
    stride: int | None = None,
    device: str = "auto",
    emulation: str = "target",
    prompts: Path | Sequence[str] | None = None,
    generations: int | None = 4,
    state: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the bytes of ``directory`` (engine or checkpoint) on ``data`` and return the report: JSON, see README.md.

    ``baseline``: the model it was made of; without it only perplexity is measured. ``data``: paths or names of hub
    data sets. ``emulation``: what the main figures are of, ``target`` (activations and KV cache rounded as the target
    would) or ``weights``; both stand in ``variants``. ``generations``: how many prompts are answered, from
    ``prompts`` or else from the text; None: all of ``prompts``. ``state``: a directory that keeps finished batches,
    so that a run that was killed goes on; removed at the end.
    """
    progress = progress or Silent()
    checkpoint = locate(directory).checkpoint
    tokenizer = load_tokenizer(checkpoint)
    sources = [data] if isinstance(data, (str, Path)) else list(data)
    run = Run(
        checkpoint=checkpoint,
        baseline=None if baseline is None else _baseline(baseline, tokenizer),
        tokenizer=tokenizer,
        tokens=encode_sources(tokenizer, sources, max_tokens=max_tokens, window=window),
        bos=begin_token(tokenizer),
        window=window,
        stride=window if stride is None else stride,
        device=device,
        emulation=emulation,
        prompts=prompts,
        generations=generations,
    )
    overlaps = known_text(checkpoint, run.tokens, progress)
    figures = run_evaluation(run, state, progress)
    identity = {"source": ", ".join(map(str, sources)), **run.data, **overlaps}
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": str(directory),
        "baseline": None if baseline is None else str(baseline),
        "emulation": emulation,
        "data": identity,
        **figures,
    }


def _baseline(directory: Path, tokenizer: Any) -> Path:
    """The checkpoint of ``directory``, which must have the vocabulary of ``tokenizer``."""
    found = locate(directory).checkpoint
    _refuse_other_vocabulary(tokenizer, found)
    return found


def known_text(checkpoint: Path, tokens: Sequence[int], progress: Progress) -> dict[str, float | None]:
    """Shares of ``tokens`` that the checkpoint was calibrated on (``calibration_overlap``) and, where it was trained,
    trained on (``training_overlap``), 0 to 1; None where its manifest does not tell.

    More than ``MOST_OVERLAP`` is said as a warning (TC-525): such figures flatter the checkpoint.
    """
    path = checkpoint / "quantize.json"
    manifest = read_json(path) if path.is_file() else {}
    kept = {"calibration_overlap": manifest.get("calibration_sketch")}
    if manifest.get("training"):
        kept["training_overlap"] = manifest["training"].get("train_sketch")
    shares = {name: shared_fraction(found, tokens) if found else None for name, found in kept.items()}
    for name, verb in (("calibration_overlap", "calibrated"), ("training_overlap", "trained")):
        share = shares.get(name)
        if share is not None and share > MOST_OVERLAP:
            finding = Finding(
                code="TC-525",
                where=str(checkpoint),
                message=f"about {share:.0%} of the evaluation text was {verb} on",
                hint="judge it on other text",
                severity="warning",
            )
            progress.note(str(finding))
    return shares


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
        tokens = encode_sources(tokenizer, [data], max_tokens=max_tokens or 2**31, window=window)
        bos = begin_token(tokenizer)
    else:
        tokens = list(data)[:max_tokens]
    target = resolve_device(device)
    model, reference = (
        load_model(path, device=target, dtype=None, emulate_activations=True)
        for path in (checkpoint, baseline)
    )
    return compare_models(model, reference, tokens, window=window, bos=bos, progress=progress)


def _refuse_other_vocabulary(tokenizer: Any, baseline: Path) -> None:
    if load_tokenizer(baseline).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"the tokenizer of {baseline} has another vocabulary",
            hint="give the baseline that the checkpoint was made of",
            code="TC-522",
        )
