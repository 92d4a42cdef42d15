"""One evaluation from the loaded models to the figures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.environment import package_versions
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import sha256_json
from toolchain.core.progress import Progress
from toolchain.evaluate import answers, intervals, summary
from toolchain.evaluate.compare import refuse_other_size
from toolchain.evaluate.measuring import Variant, Work, fitting_rows, measure
from toolchain.evaluate.observing import moe_layers
from toolchain.evaluate.perplexity import vocab_size_of
from toolchain.evaluate.records import Records
from toolchain.evaluate.state import State
from toolchain.evaluate.tokens import token_hash
from toolchain.evaluate.windows import cut
from toolchain.runtime.model import load_model, resolve_device

if TYPE_CHECKING:
    from toolchain.modeling.emulation import Emulation

TARGET, WEIGHTS, KV_NONE = "target", "weights", "kv_none"
EMULATIONS = (TARGET, WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is evaluated, resolved."""

    checkpoint: Path
    baseline: Path | None
    tokenizer: Any = field(repr=False)
    tokens: list[int] = field(repr=False)
    bos: int | None
    window: int
    stride: int
    device: str
    emulation: str
    prompts: Path | Sequence[str] | None
    generations: int | None

    def __post_init__(self) -> None:
        if self.emulation not in EMULATIONS:
            raise UsageError(
                f"unknown emulation {self.emulation!r}",
                hint=f"one of {', '.join(EMULATIONS)}",
                code="TC-523",
            )

    @property
    def data(self) -> dict[str, Any]:
        """What names the text: two evaluations compare where all of it is equal."""
        return {
            "tokens": len(self.tokens),
            "token_hash": token_hash(self.tokens),
            "window": self.window,
            "stride": self.stride,
            "bos": self.bos is not None,
        }

    def all_prompts(self) -> list[answers.Prompt]:
        count = self.generations
        if count is not None and count < 0:
            raise UsageError(f"{count} prompts cannot be answered", hint="0 or more", code="TC-523")
        if self.prompts is not None:
            return answers.given_prompts(self.tokenizer, self.prompts, count)
        count = answers.PROMPTS if count is None else count
        return answers.held_out_prompts(
            self.tokenizer, self.tokens, window=self.window, bos=self.bos, count=count
        )


@dataclass(frozen=True, kw_only=True)
class Models:
    model: Any
    baseline: Any | None
    variants: dict[str, Variant]
    """Names of the report -> how the model is run. Names that mean the same forward share it."""

    @property
    def distinct(self) -> list[Variant]:
        return list({variant.name: variant for variant in self.variants.values()}.values())


def run_evaluation(run: Run, state: Path | None, progress: Progress) -> dict[str, Any]:
    """The figures of the report, from ``tokens`` to ``generations``; what was asked wrongly is refused first."""
    windows = cut(len(run.tokens), window=run.window, stride=run.stride, bos=run.bos is not None)
    prompts = run.all_prompts()
    models = load(run, progress)
    _refuse_unknown_ids(run, models, prompts)
    work = Work(
        token_ids=run.tokens,
        windows=windows,
        bos=run.bos,
        batch_size=fitting_rows(models.model, run.window),
    )
    opened: AbstractContextManager[State | None] = nullcontext()
    if state is not None:
        opened = State(state, _settings(run, models, work, prompts), progress)
    with opened as kept:
        generated = kept.generations() if kept else None
        if generated is None:
            generated = _generate(run, models, prompts, progress)
            if kept:
                kept.keep_generations(generated)
        records = measure(
            models.model, models.baseline, work, variants=models.distinct, state=kept, progress=progress
        )
        report = {**_report(run, models, records), "generations": generated}
        if kept:
            kept.remove()
    return report


def load(run: Run, progress: Progress) -> Models:
    """Both models on one device, and the ways in which the quantized one is run."""
    from toolchain.modeling.emulation import emulation_of

    device = resolve_device(run.device)

    def read(path: Path, emulate: bool = True) -> Any:
        progress.note(f"loading {path}")
        return load_model(path, device=device, dtype=None, emulate_activations=emulate)

    emulated = True
    try:
        model = read(run.checkpoint)
    except ToolchainError as error:
        if error.code != "TC-510" or run.emulation != WEIGHTS:
            raise
        progress.note(f"only the weights are evaluated: {error.message}")
        model, emulated = read(run.checkpoint, emulate=False), False
    baseline = read(run.baseline) if run.baseline else None
    if baseline is not None:
        refuse_other_size(model, baseline)
    switches = emulation_of(model)
    variants = _variants(switches) if emulated else {WEIGHTS: _WEIGHTS_ALONE}
    return Models(model=model, baseline=baseline, variants=variants)


_WEIGHTS_ALONE = Variant(name=WEIGHTS, activations=False, kv_cache=False)


def _variants(switches: Emulation) -> dict[str, Variant]:
    """Names that mean the same forward get the same variant."""
    rounds, quantized_kv = switches.rounds_activations, switches.rounds_kv_cache
    wanted = {TARGET: (rounds, quantized_kv), WEIGHTS: (False, False)}
    if quantized_kv:
        wanted[KV_NONE] = (rounds, False)
    names = {how: name for name, how in reversed(wanted.items())}
    return {
        name: Variant(name=names[how], activations=how[0], kv_cache=how[1]) for name, how in wanted.items()
    }


def _refuse_unknown_ids(run: Run, models: Models, prompts: Sequence[answers.Prompt]) -> None:
    """An id without an embedding would end in an index error, on a GPU in a lost CUDA context."""
    size = vocab_size_of(models.model)
    largest = max([*run.tokens, *(token for prompt in prompts for token in prompt.ids)])
    if largest >= size:
        raise UsageError(
            f"the tokenizer gives token {largest}, the model's embedding ends at {size - 1}",
            hint="this tokenizer belongs to another model: put the right one beside config.json",
            code="TC-207",
        )


def _generate(
    run: Run, models: Models, prompts: Sequence[answers.Prompt], progress: Progress
) -> list[dict[str, Any]]:
    """Before the long loop: a prompt that is too long must not end it."""
    from toolchain.modeling.emulation import emulating

    if not prompts:
        return []
    progress.note(f"generating from {len(prompts)} prompts")
    chosen = models.variants[run.emulation]
    theirs = None
    with emulating(models.model, activations=chosen.activations, kv_cache=chosen.kv_cache):
        mine = answers.generate(run.checkpoint, models.model, run.tokenizer, prompts)
    if run.baseline is not None:
        theirs = answers.generate(run.baseline, models.baseline, run.tokenizer, prompts)
    return answers.side_by_side(run.tokenizer, prompts, mine, theirs)


def _report(run: Run, models: Models, records: Records) -> dict[str, Any]:
    main = models.variants[run.emulation].name
    experts = {layer: module.num_experts for layer, module in moe_layers(models.model).items()}
    report: dict[str, Any] = {
        **summary.figures(records, main),
        "intervals": summary.confidence(records, main),
        "bootstrap": {
            "level": intervals.LEVEL,
            "over": "windows",
            "windows": len(records["scored"]),
            "resamples": intervals.RESAMPLES,
            "seed": intervals.SEED,
        },
    }
    if run.baseline is not None:
        report["kl_histogram"] = summary.histogram(records, main)
    report["layers"] = summary.layers(records, main, experts)
    report["variants"] = {
        name: summary.figures(records, variant.name) for name, variant in models.variants.items()
    }
    return report


def _settings(run: Run, models: Models, work: Work, prompts: Sequence[answers.Prompt]) -> dict[str, Any]:
    """Everything that the figures depend on."""
    return {
        "checkpoint": _identity(run.checkpoint),
        "baseline": run.baseline and _identity(run.baseline),
        **run.data,
        "batch_size": work.batch_size,
        "device": str(models.model.device),
        "emulation": run.emulation,
        "variants": sorted(models.variants),
        "prompts": sha256_json([prompt.ids for prompt in prompts]),
        "versions": package_versions(),
    }


def _identity(directory: Path) -> str:
    """Names, sizes and times of the files that make the model: hashing 60 GB would take longer than a batch."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")])
    stats = {file.name: file.stat() for file in files}
    return sha256_json({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()})
